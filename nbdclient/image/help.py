"""The text of --help. {program} is the program's name."""

TEXT = """\
Usage: {program} [-h | -V | -T PATTERN] COMMAND [OPTIONS]

Make, describe, check, change and copy disk images. The options of every
command are those of qemu-img. Sizes may end in k, M, G, T, P or E.
With --untrusted no file is opened that an image names (backing file, data
file), only what the command line names.

Supported formats: {formats}
"""
