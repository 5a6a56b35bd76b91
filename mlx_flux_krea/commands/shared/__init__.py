"""Parts that several verbs use: options, jobs, prompt files, runs, outputs, terminal, signals."""
