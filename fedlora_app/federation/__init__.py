"""What travels between server and clients, how, and what the server makes of it."""
