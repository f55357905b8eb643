"""How the bundled model is made: corpus, tokenizer, training on samples, export, in this order."""
