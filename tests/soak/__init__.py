"""The soak: many users ask a real model for a long time, leave when they like, and make mistakes.

    python -m tests.soak --requests 100000 --users 8

`plan` says what request number n of a seed is, `users` ask it (as threads and as tasks), `ledger`
keeps the accounts and gives the verdict. The exit code is 1 if anything at all was wrong.
"""
