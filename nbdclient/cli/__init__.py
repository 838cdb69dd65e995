"""The subcommands of `nbdclient`. Each module has run(arguments), imported when it is used."""
