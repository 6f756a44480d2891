"""What was handed out: recorded until it expires, apart from reuse, and ended before that."""
