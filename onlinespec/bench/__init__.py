"""What `onlinespec bench` runs: it talks to any SGLang server through the OpenAI API."""
