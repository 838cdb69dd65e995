"""The symmetric ciphers of libgcrypt, reached by ctypes.

Its functions are called with the interpreter's lock held. One of them encrypts a sector by AES in a
third of a microsecond: to let go of the lock around it and take it again costs as much when nobody
wants it, and a hundred times more when another thread does. See docs/drivers/luks.md, "Speed".
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_int, c_size_t, c_uint, c_void_p

from drivers.errors import OptionError

_SONAME = "libgcrypt.so.20"
_NEEDED_VERSION = b"1.8.0"  # the first with XTS
_DISABLE_SECURE_MEMORY = 37
_INITIALIZATION_FINISHED = 38
_IS_INITIALIZED = 39

# Modes, by the names that QEMU and LUKS headers use.
MODES = {"ecb": 1, "cbc": 3, "ctr": 6, "xts": 13}


class Handle:
    """A cipher with its key, in one of MODES, for one thread at a time.

    `raw` is what the library's functions want; an IV stays set until the next is.
    """

    def __init__(self, library: ctypes.PyDLL, algorithm: int, mode: int, key: bytes) -> None:
        self.raw = c_void_p()
        self._close = library.gcry_cipher_close
        if library.gcry_cipher_open(ctypes.byref(self.raw), algorithm, mode, 0):
            raise OptionError("libgcrypt refuses this combination of cipher algorithm and mode")
        if library.gcry_cipher_setkey(self.raw, key, len(key)):
            raise OptionError(f"libgcrypt refuses a key of {len(key)} bytes")

    def __del__(self) -> None:
        self._close(self.raw)


@functools.cache
def load() -> ctypes.PyDLL:
    """The library, initialised. Raises OptionError where it is missing."""
    try:
        library = ctypes.PyDLL(_SONAME)
    except OSError:
        raise OptionError(
            f"Encryption needs {_SONAME}, which is not installed; "
            "on Debian and Ubuntu: apt-get install libgcrypt20"
        ) from None
    library.gcry_check_version.argtypes = [c_char_p]
    library.gcry_check_version.restype = c_char_p
    if library.gcry_check_version(_NEEDED_VERSION) is None:
        raise OptionError(f"Encryption needs libgcrypt {_NEEDED_VERSION.decode()} or newer")
    if not library.gcry_control(_IS_INITIALIZED, 0):
        library.gcry_control(_DISABLE_SECURE_MEMORY, 0)
        library.gcry_control(_INITIALIZATION_FINISHED, 0)
    library.gcry_cipher_open.argtypes = [c_void_p, c_int, c_int, c_uint]
    library.gcry_cipher_close.argtypes = [c_void_p]
    library.gcry_cipher_close.restype = None
    for name in ("setkey", "setiv", "setctr"):
        function = getattr(library, f"gcry_cipher_{name}")
        function.argtypes = [c_void_p, c_char_p, c_size_t]
        function.restype = c_uint
    for name in ("encrypt", "decrypt"):
        function = getattr(library, f"gcry_cipher_{name}")
        function.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t]
        function.restype = c_uint
    return library
