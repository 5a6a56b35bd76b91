"""Content filters and review, which the licence of FLUX.1 [dev] models requires before a picture is released.

gate.py             the policy: checks, their order, and the meaning of each answer
duty.py             what is refused before a run: outputs that nobody could judge, runs of models with that duty
judges.py           the installed filters: their answers and self-tests
instructions.py     the questions to the language model, with the reason for each sentence
acknowledgement.py  the licence's text, and the record that a person has agreed to it
ledger.py           quarantine and release: the only way by which a picture reaches the user
log.py              the record of checks and releases, as a chain of hashes
"""
