"""What comes in and goes out as JSON, without anything of aiohttp."""
