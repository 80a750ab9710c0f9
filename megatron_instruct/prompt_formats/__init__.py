"""How texts are put to a synthesizer and how its pairs are written: formats as data, what reads and writes pairs in them."""
