"""Train with a file of ``gradctl export --graph train-step``: onnxruntime and numpy only.

``python run.py step.onnx [STEPS]`` makes steps on the example batch, and prints the loss of each.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

path, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
content = path.with_suffix(".safetensors").read_bytes()
end = 8 + int.from_bytes(content[:8], "little")
header = json.loads(content[8:end])
feeds = json.loads(header.pop("__metadata__")["train_step"])["feeds"]  # output of a step: input of the next
dtypes = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
values = {
    name: np.frombuffer(content[end:][slice(*each["data_offsets"])], dtypes[each["dtype"]]).reshape(each["shape"])
    for name, each in header.items()
}
session = onnxruntime.InferenceSession(path)
names = [output.name for output in session.get_outputs()]
for number in range(1, steps + 1):
    found = dict(zip(names, session.run(None, values), strict=True))
    values |= {name: found[output] for output, name in feeds.items()}
    print(f"step {number:3}  loss {found['loss'].item():.6f}")
