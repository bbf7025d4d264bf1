"""Dense and Conv2D layers that hold their kernel in another form than files have it."""

import functools


class KernelForm:
    """What such a layer becomes, besides what it is. Subclasses say in `form` what its kernel is, in `way_back` how to
    have the float kernel instead, and in `file` what has a place for it."""

    def save_own_variables(self, store):
        raise ValueError(f"Keras' files have no place for the {self.form} kernel of {self.path}: {self.file} has.")


@functools.cache
def _with_form(form, cls):
    return type(f"{form.__name__.removesuffix('Kernel')}{cls.__name__}", (form, cls), {})


def change_kernel(layer, form, **variables):
    """Gives a built layer the methods of a `KernelForm` and other variables for its kernel, yet without their values.

    Args:
        form: subclass of `KernelForm`.
        **variables: name → (shape, dtype); the one named `kernel` takes the kernel's place.
    """
    kernel = layer._kernel
    layer._tracker.unlock()
    layer._untrack_variable(kernel)
    layer.__class__ = _with_form(form, type(layer))
    for name, (shape, dtype) in variables.items():
        variable = layer.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)
        variable._path = f"{kernel.path.rpartition('/')[0]}/{name}"
        setattr(layer, "_kernel" if name == "kernel" else name, variable)
    layer._tracker.lock()


def shape_in_files(variable):
    """The shape that files have a variable in; where it has another, `from_file` makes its value of what they hold."""
    return getattr(variable, "shape_in_files", tuple(variable.shape))


def layers_of(model, form=KernelForm):
    """The layers of a model whose kernels have that form."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, form)]


def refuse_forms(model, what, form=KernelForm):
    """Raises ValueError where kernels of a model have another form, for what cannot be done with them."""
    for layer in layers_of(model, form):
        raise ValueError(f"{what} needs float weights; those of the {model.name} are {layer.form}. {layer.way_back}")
