"""Streams as clients see them: Locust users, what they send, what they check and measure.

Nothing here knows the server but by its URL.
"""
