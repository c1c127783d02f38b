"""Training without a server: from a recording, through the learner that the sidecar uses; recordings from data sets."""
