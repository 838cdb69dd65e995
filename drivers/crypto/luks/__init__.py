"""LUKS version 1, as QEMU and cryptsetup write it: the header, its key slots, and the keys."""
