"""How the bundled model is made. In this order, DIR being any folder:

python -m benchmarks.nano.corpus DIR/corpus
python -m benchmarks.nano.tokenizer DIR/corpus DIR/tokenizer
python -m benchmarks.nano.train --corpus DIR/corpus --tokenizer DIR/tokenizer --out DIR/run
python -m benchmarks.nano.export --run DIR/run --tokenizer DIR/tokenizer --out DIR/model
python -m benchmarks.nano.sequences --run DIR/run --tokenizer DIR/tokenizer DIR/sequences.npy
python -m rheoserve_sgl.gate.distill --model DIR/model --data DIR/sequences.npy --out DIR/gate

Instead of the last two steps, `--gates 0.3 --gates-until 0.6 --gates-later 0.1 --selected` lets train write a gate that
has learnt beside the model, and the model learn to get by with what it picks; export then writes DIR/model/gate. The
bundled model was made so, in several runs: its card (rheoserve_sgl/nano/model/README.md) has them.
"""
