"""Encryption of sectors: ciphers, what LUKS and qcow's own AES make of them, and key derivation."""
