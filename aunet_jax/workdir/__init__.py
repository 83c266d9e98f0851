"""What a run leaves on disk or in a bucket, and reading it back.

Read `layout.py` first.
"""
