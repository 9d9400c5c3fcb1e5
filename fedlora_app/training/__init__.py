"""One phase of training at a client, and how much memory a step of it takes."""
