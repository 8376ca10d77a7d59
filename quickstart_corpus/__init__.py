"""The built-in corpus: an invented archipelago's encyclopaedia, with texts, questions and clozes about it."""
