"""An HTTP server for one checkpoint, in the protocol of OpenAI's API."""
