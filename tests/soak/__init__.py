"""The soak: many users ask a real model for a long time, leave when they like, and make mistakes.

    python -m tests.soak --requests 100000 --users 8
    python -m tests.soak --http --minutes 30 --users 16

`plan` says what request number n of a seed is, `users` ask it (as threads and as tasks), `ledger`
keeps the accounts and gives the verdict; `http` is the same for a server and those who use it. The
exit code is 1 if anything at all was wrong.
"""
