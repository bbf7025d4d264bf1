"""OpenVINO's convolutions have the channels first, our pictures last: the transposes between them are moved until they
meet and cancel."""

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]
ELEMENTWISE = "Add Subtract Multiply Divide Power Sqrt Swish Sigmoid Gelu Convert".split()


def channels_first(model):
    """Rewrites an `openvino.Model` of fixed shapes: what transposed pictures go through is computed before the
    transpose, and a transpose forth after one back is none."""
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Transpose" and _order(node) == FIRST and _before(node.input_value(0)):
            node.output(0).replace(_before(node.input_value(0)))
        elif kind in MOVES and len(node.get_output_shape(0)) == 4 and any(map(_before, node.input_values())):
            MOVES[kind](node)
    model.validate_nodes_and_infer_types()


def _order(transpose):
    order = transpose.input_value(1).get_node()
    return list(order.data) if order.get_type_name() == "Constant" else None


def _before(value):
    """The picture with its channels first, of which `value` is the transpose; None where it is none."""
    node = value.get_node()
    return node.input_value(0) if node.get_type_name() == "Transpose" and _order(node) == LAST else None


def _first(value):
    """A value with its channels first, whatever broadcasts against a picture."""
    from openvino import opset16

    shape = list(value.get_shape())
    if _before(value) or not any(side > 1 for side in shape):
        return _before(value) or value
    if len(shape) < 4:
        value = opset16.reshape(value, [1] * (4 - len(shape)) + shape, False).output(0)
    return opset16.transpose(value, FIRST).output(0)


def _elementwise(node):
    _move(node, map(_first, node.input_values()))


def _concat(node):
    pictures = node.input_values()
    if node.get_attributes()["axis"] in (3, -1) and len({one.get_node().get_instance_id() for one in pictures}) > 1:
        node.set_attribute("axis", 1)
        _move(node, map(_first, pictures))


def _reduced(node):
    from openvino import opset16

    axes = node.input_value(1).get_node()
    if axes.get_type_name() == "Constant" and sorted(axes.data) == [1, 2] and node.get_attributes()["keep_dims"]:
        _move(node, [_first(node.input_value(0)), opset16.constant([2, 3]).output(0)])


def _padded(node):
    from openvino import opset16

    picture, *pads = node.input_values()
    if all(one.get_node().get_type_name() == "Constant" for one in pads[:2]):
        pads[:2] = (opset16.constant(one.get_node().data[FIRST]).output(0) for one in pads[:2])
        _move(node, [_first(picture), *pads])


def _move(node, inputs):
    """Computes a node from inputs with their channels first; who used it uses its transpose."""
    from openvino import opset16

    users = node.output(0).get_target_inputs()
    for place, value in zip(node.inputs(), [*inputs]):
        place.replace_source_output(value)
    node.validate_and_infer_types()
    last = opset16.transpose(node.output(0), LAST).output(0)
    for user in users:
        user.replace_source_output(last)


MOVES = {**dict.fromkeys(ELEMENTWISE, _elementwise), "Concat": _concat, "ReduceMean": _reduced, "Pad": _padded}
