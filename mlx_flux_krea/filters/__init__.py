"""What the licence of FLUX.1 [dev] models asks for: filters, or a person's review, before a picture is passed on.

gate.py          the policy: what is checked, in which order, and what an answer means
judges.py        the installed filters: what they must answer with, and their self-tests
instructions.py  what the language model is asked, with the reason for each sentence
acknowledgement.py   the licence's text, and that a person has acknowledged it
ledger.py        quarantine and release: nothing reaches the user but through here
log.py           what happened, as a chain of hashes
"""
