"""The EAGLE-3 draft in plain torch: sample, model, checkpoint, losses. No sockets, no clock, no sglang."""
