"""The text of --help. {program} is the program's name."""

TEXT = """\
Usage: {program} [OPTIONS] FILE
       {program} [OPTIONS] --export NAME=IMAGE-OPTS ... [FILE]
       {program} --list [OPTIONS]

Serve disk images to NBD clients, or list what a server offers. Values in
parentheses hold where the option is absent.

  -h, --help               show this text
  -V, --version            show the version

Where to listen (with --list: where to connect):
  -b, --bind=HOST          local address (0.0.0.0)
  -p, --port=PORT          TCP port (10809); 0 picks a free one
  -k, --socket=PATH        Unix socket with this absolute path instead of TCP;
                           '-' makes one in a private directory
      --selinux-label=LABEL
                           security label of the listening Unix socket

Clients:
  -e, --shared=N           at most N clients at once (1); 0: no limit
  -t, --persistent         stay when the last client has left
      --handshake-limit=S  drop a client that is not through the handshake
                           after S seconds (10); 0: never

What is exported:
  -x, --export-name=NAME   the export's name (empty)
  -D, --description=TEXT   a text about the export for people
      --export=NAME=IMAGE-OPTS
                           one more export; repeatable; FILE is optional then
  -o, --offset=BYTES       leave out so many bytes at the image's beginning
  -A, --allocation-depth   let clients ask in which backing layer data lies
  -B, --bitmap=NAME        let clients ask for this dirty bitmap; repeatable

How the image is opened:
  -f, --format=FORMAT      format of FILE (raw, ...); found by probing if absent
      --image-opts         FILE is a list of options: driver=raw,file.filename=F
      --untrusted          open no file that an image names (backing file, data
                           file), only what is named here
  -r, --read-only          no client can write
  -s, --snapshot           writes go to a temporary file, lost at the end
  -l, --load-snapshot=SNAPSHOT
                           export an internal snapshot, by its id or name
      --cache=MODE         none, writeback (the default), writethrough,
                           directsync or unsafe
  -n, --nocache            the same as --cache=none
      --aio=MODE           threads, native or io_uring
      --discard=MODE       ignore (the default) or unmap what clients trim
      --detect-zeroes=MODE off (the default), on, or unmap: turn written zeroes
                           into a request for zeroes, or for a hole

      --object=secret,id=ID,data=TEXT|file=FILE,...
                           define a password that image options refer to;
                           '--object help' lists the types

Process:
      --fork               go to the background once clients can connect
      --pid-file=FILE      write the process id to FILE once clients can connect
      --run=COMMAND        run a shell command that finds the server in $uri
                           and $unixsocket; serve until it ends and exit with
                           its status
  -v, --verbose            keep standard error with --fork; tell more with -L
  -T, --trace=PATTERN      report trace events; '-T help' lists them; in full:
                           [enable=]PATTERN,events=FILE,file=FILE

Listing another server:
  -L, --list               print that server's exports
      --json               print them as JSON

Not supported yet:
  -c, --connect=DEV        serve FILE to a kernel NBD device
  -d, --disconnect         disconnect the kernel NBD device FILE
      --tls-creds=ID       encrypt connections
      --tls-authz=ID       which clients are let in
      --tls-hostname=NAME  name to check in the server's certificate

A numeric argument may be decimal, 0x hexadecimal or 0 octal.
"""
