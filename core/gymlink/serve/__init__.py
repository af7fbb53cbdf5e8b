"""The gateway as a program of its own: `gymlink serve`, for a trainer that has no plugin."""
