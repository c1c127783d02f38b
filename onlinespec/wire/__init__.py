"""What crosses a process border: messages, tensor frames, sockets. No torch, no sglang."""
