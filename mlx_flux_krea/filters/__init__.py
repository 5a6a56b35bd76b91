"""What the licence of FLUX.1 [dev] models asks for: filters, or a person's review, before a picture is passed on.

gate.py           the policy: what is checked, in which order, and what an answer means
ledger.py         quarantine, log and release: nothing reaches the user but through here
instructions.py   what the language model is asked, with the reason for each sentence
"""
