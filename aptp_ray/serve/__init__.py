"""Ray Serve: HTTP in the shape of OpenAI's Images API before a router and one deployment an expert."""
