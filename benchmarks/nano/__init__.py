"""How the bundled model is made. In this order, DIR being any folder:

python -m benchmarks.nano.corpus DIR/corpus
python -m benchmarks.nano.tokenizer DIR/corpus DIR/tokenizer
python -m benchmarks.nano.train --corpus DIR/corpus --tokenizer DIR/tokenizer --out DIR/run
python -m benchmarks.nano.export --run DIR/run --tokenizer DIR/tokenizer --out DIR/model
python -m benchmarks.nano.sequences --run DIR/run --tokenizer DIR/tokenizer DIR/sequences.npy
python -m rheoserve_sgl.gate.distill --model DIR/model --data DIR/sequences.npy --out DIR/gate
"""
