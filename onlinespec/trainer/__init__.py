"""Learning from the stream: assembling, buffer, batch, step. Pure: no sockets, no files, no clock."""
