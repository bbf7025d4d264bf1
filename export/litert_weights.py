"""Puts the weights into a LiteRT file whose graph takes them as inputs.

The converter holds several copies of every constant, more than 20 GB for the U-Net of SD v1, and its messages end at
2 GB. A graph that is converted with its weights as inputs is small; here each of those inputs becomes a constant,
narrowed and written one at a time, behind the graph, where a file may have any size.

Format: schema.fbs of https://github.com/google-ai-edge/LiteRT (`Buffer.offset` and `size`).
"""

import itertools

import numpy as np
from tensorflow.lite.python import schema_py_generated as schema

OPERATORS = schema.BuiltinOperator
FLOAT32, FLOAT16, INT8 = schema.TensorType.FLOAT32, schema.TensorType.FLOAT16, schema.TensorType.INT8
# The version of an operator says what of it a file uses: int8 weights with a scale per row, half-precision inputs …
VERSIONS = {
    OPERATORS.FULLY_CONNECTED: 12,
    OPERATORS.CONV_2D: 5,
    OPERATORS.DEQUANTIZE: 3,
    OPERATORS.GATHER: 7,
    OPERATORS.CAST: 1,
    OPERATORS.MUL: 1,
}
SMALL = 1024  # numbers; smaller weights stay float32 in int8 files, as LiteRT's own converter has it
ALIGNMENT = 64  # bytes


def write_with_weights(graph, path, inputs, outputs, weights, precision):
    """Writes a `.tflite` file.

    Args:
        graph: bytes of the converted graph; its inputs are `inputs`, then one float32 tensor per weight.
        path: file to write.
        inputs, outputs: names for the signature `serving_default`, in the graph's order.
        weights: list of functions () → float32 array, called when the weight is written.
        precision: "float32", "float16" (weights are widened when the file is loaded) or "int8" (symmetric, a scale
            per row; activations stay float32 and are narrowed on the fly: dynamic-range quantization).

    Raises:
        ValueError: the converter made something of a weight that is not known here.
    """
    model = schema.ModelT.InitFromPackedBuf(bytearray(graph), 0)
    _Filler(model, len(inputs), weights, precision).write(path, inputs, outputs)


class _Filler:
    def __init__(self, model, first_weight, weights, precision):
        self.model, self.graph, self.precision = model, model.subgraphs[0], precision
        self.constants = {}  # (weight, axes) → index of the tensor that operators read
        self.data = []  # (buffer, function () → array), in the order of the file
        places = {tensor: i for i, tensor in enumerate(self.graph.inputs[first_weight:])}
        self.graph.inputs = self.graph.inputs[:first_weight]
        self.aliases, self.operators = {}, []  # what a dropped transposition wrote → what to read instead
        for operator in self.graph.operators:
            operator.inputs = [self.aliases.get(i, i) for i in operator.inputs]
            place = next((k for k, i in enumerate(operator.inputs) if i in places), None)
            if place is None:
                self.operators.append(operator)
            else:
                self.fill(operator, place, places[operator.inputs[place]], weights)
        self.graph.operators = self.operators

    def fill(self, operator, place, i, weights):
        kind = self.model.operatorCodes[operator.opcodeIndex].builtinCode
        if (kind, place) == (OPERATORS.TRANSPOSE, 0):
            axes = tuple(self.constant_value(operator.inputs[1]).tolist())
            self.aliases[operator.outputs[0]] = self.constant(i, weights[i], axes)
        elif (kind, place) == (OPERATORS.BATCH_MATMUL, 1) and not operator.builtinOptions.adjY:
            operator.inputs = [operator.inputs[0], self.constant(i, weights[i], (1, 0)), -1]
            operator.opcodeIndex = self.code(OPERATORS.FULLY_CONNECTED)
            operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
            operator.builtinOptions = schema.FullyConnectedOptionsT()
            operator.builtinOptions.keepNumDims = True
            self.operators.append(operator)
        elif (kind, place) == (OPERATORS.GATHER, 0):
            self.gather(operator, i, weights[i])
        else:
            names = {value: name for name, value in vars(OPERATORS).items()}
            raise ValueError(f"The converter reads weight {i} in {names[kind]} as input {place}; that is not known.")

    def gather(self, operator, i, weight):
        """Rows of an embedding: narrow rows are gathered, then widened."""
        output, shape = operator.outputs[0], weight().shape
        self.operators.append(operator)
        if self.precision == "float32":
            operator.inputs[0] = self.tensor(FLOAT32, shape, weight)
            return
        operator.opcodeIndex = self.code(OPERATORS.GATHER)
        rows = list(self.graph.tensors[output].shape)
        if self.precision == "float16":
            operator.inputs[0] = self.tensor(FLOAT16, shape, lambda: weight().astype("float16"))
            operator.outputs = [self.tensor(FLOAT16, rows)]
            self.operator(OPERATORS.DEQUANTIZE, operator.outputs, output)
            return
        operator.inputs[0] = self.tensor(INT8, shape, lambda: _narrow(weight())[0])
        operator.outputs = [self.tensor(INT8, rows)]
        wide, scale = self.tensor(FLOAT32, rows), self.tensor(FLOAT32, [*rows[:-1], 1])
        self.operator(OPERATORS.CAST, operator.outputs, wide, "CastOptions", inDataType=INT8, outDataType=FLOAT32)
        scales = self.tensor(FLOAT32, (shape[0], 1), lambda: _narrow(weight())[1][:, None])
        axis = {"axis": operator.builtinOptions.axis}
        self.operator(OPERATORS.GATHER, [scales, operator.inputs[1]], scale, "GatherOptions", **axis)
        self.operator(OPERATORS.MUL, [wide, scale], output, "MulOptions")

    def constant(self, i, weight, axes):
        """The tensor that holds a transposed weight."""
        if (i, axes) not in self.constants:
            array = weight()
            shape = [array.shape[axis] for axis in axes]
            if self.precision == "float32" or (self.precision == "int8" and array.size < SMALL):
                tensor = self.tensor(FLOAT32, shape, lambda: weight().transpose(axes))
            elif self.precision == "float16":
                narrow = self.tensor(FLOAT16, shape, lambda: weight().transpose(axes).astype("float16"))
                tensor = self.tensor(FLOAT32, shape)
                self.operator(OPERATORS.DEQUANTIZE, [narrow], tensor)
            else:
                tensor = self.tensor(INT8, shape, lambda: _narrow(weight().transpose(axes))[0])
                quantization = self.graph.tensors[tensor].quantization = schema.QuantizationParametersT()
                quantization.scale = _narrow(array.transpose(axes))[1]
                quantization.zeroPoint = np.zeros(shape[0], "int64")
            self.constants[i, axes] = tensor
        return self.constants[i, axes]

    def tensor(self, kind, shape, data=None):
        """Index of a new tensor, a constant where `data` is given."""
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.shape, tensor.buffer = f"added_{len(self.graph.tensors)}", kind, shape, 0
        tensor.hasRank = True
        if data is not None:
            buffer = schema.BufferT()
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
            self.data.append((buffer, data, kind, shape))
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, kind, inputs, output, options=None, **values):
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = self.code(kind), list(inputs), [output]
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
            for name, value in values.items():
                setattr(operator.builtinOptions, name, value)
        self.operators.append(operator)

    def code(self, kind):
        for i, code in enumerate(self.model.operatorCodes):
            if code.builtinCode == kind:
                code.version = max(code.version, VERSIONS[kind])
                return i
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = VERSIONS[kind]
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def constant_value(self, tensor):
        return np.frombuffer(bytes(self.model.buffers[self.graph.tensors[tensor].buffer].data), "int32")

    def write(self, path, inputs, outputs):
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = _tensor_map(inputs, self.graph.inputs)
        signature.outputs = _tensor_map(outputs, self.graph.outputs)
        self.model.signatureDefs = [signature]
        if self.precision == "int8":
            for operator in self.operators:
                if isinstance(operator.builtinOptions, schema.FullyConnectedOptionsT):
                    operator.builtinOptions.asymmetricQuantizeInputs = True
            self.code(OPERATORS.FULLY_CONNECTED), self.code(OPERATORS.CONV_2D)
        sizes = [int(np.prod(shape)) * {FLOAT32: 4, FLOAT16: 2, INT8: 1}[kind] for _, _, kind, shape in self.data]
        steps = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        start = 2  # any: what a number takes in the file does not depend on its value
        for _ in range(2):
            for (buffer, *_), size, offset in zip(self.data, sizes, itertools.accumulate(steps, initial=start)):
                buffer.offset, buffer.size = offset, size
            graph = _pack(self.model)
            start = -(-len(graph) // ALIGNMENT) * ALIGNMENT
        with open(path, "wb") as file:
            file.write(graph.ljust(start, b"\0"))
            for (_, data, _, _), step in zip(self.data, steps):
                file.write(np.ascontiguousarray(data()).tobytes().ljust(step, b"\0"))


def _narrow(weight):
    """float32 (N, …) → int8 (N, …) and scales float32 (N,): the largest of each row becomes 127."""
    rows = weight.reshape(len(weight), -1)
    scale = np.abs(rows).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    return np.round(rows / scale[:, None]).astype("int8").reshape(weight.shape), scale.astype("float32")


def _tensor_map(names, tensors):
    entries = []
    for name, tensor in zip(names, tensors):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        entries.append(entry)
    return entries


def _pack(model):
    import flatbuffers

    builder = flatbuffers.Builder(2**20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
