"""The parts of a pipeline: loaded at first use, given up, replaced, and changed by what people bring along."""

import functools
import gc
import pathlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import keras

from keras_sd.arguments import check_integer, check_number, check_ratio
from keras_sd.denoiser import Denoiser
from keras_sd.lora import Adapters, add_lora, lora_factors, lora_layers, remove_lora, target_layers
from keras_sd.memory import trim
from keras_sd.presets import locate
from keras_sd.scheduler_config import read_scheduler_config
from keras_sd.weights.int8 import quantize
from keras_sd.weights.lora import write_lora
from keras_sd.weights.streaming import settle, streamed
from keras_sd.weights.textual_inversion import read_textual_inversion


class Parts:
    """Tokenizer, scheduler and the four models of a preset; what `keras_sd.StableDiffusion` draws with."""

    def __init__(
        self,
        img_height=None,
        img_width=None,
        jit_compile=None,
        *,
        preset="sd-v1-4",
        dtype=None,
        tokenizer=None,
        two_pass_guidance=False,
        vae_slicing=None,
        vae_tiling=None,
        low_memory=False,
        vae=None,
        safety_checker=None,
        cache_interval=1,
        token_merging=0.0,
    ):
        self.preset, self.dtype, self.jit_compile = preset, dtype, jit_compile
        self.two_pass_guidance = two_pass_guidance
        self.vae_slicing, self.vae_tiling = vae_slicing, vae_tiling
        if low_memory:  # OpenVINO would compile every band
            self.vae_slicing, self.vae_tiling = True, keras.backend.backend() != "openvino" or vae_tiling
        self.low_memory = low_memory
        self.keeps_models = not low_memory  # whether one stays when the next is read
        self.cache_interval = check_integer("cache_interval", cache_interval, 1)
        self.token_merging = check_ratio("token_merging", token_merging)
        self._replaceable = {}  # name → model that was read from files and can be again
        self._reading = {}  # name → future of a model that `read_ahead` reads
        self._tokenizer_source, self._vae_source, self._safety_checker_source = tokenizer, vae, safety_checker
        self._image_prompt = None  # what load_ip_adapter loads
        self.flagged = None  # of the last call's pictures, which ones the safety checker blacked out; None without one
        for name, value in (("img_height", img_height), ("img_width", img_width)):
            if value is not None:
                check_integer(name, value, 8)
        self._size = (img_height, img_width)

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Opens a model.

        Args:
            preset: a built-in name (`keras_sd.PRESETS`), a path (folder in the diffusers or KerasCV layout,
                `.safetensors` or `.ckpt` file), or `hf://owner/name`.
            **kwargs: further arguments of `StableDiffusion`.

        Raises:
            ValueError, FileNotFoundError: no such preset or path, or what is there is no checkpoint.
        """
        model = cls(preset=preset, **kwargs)
        model.checkpoint, model.safety_checker  # noqa: B018  (a wrong name is said here, not at the first picture)
        return model

    # === Parts, loaded at first use ===

    @functools.cached_property
    def checkpoint(self):
        from keras_sd.checkpoint import open_checkpoint, with_vae

        checkpoint = open_checkpoint(locate(self.preset), self._tokenizer_source)
        return checkpoint if self._vae_source is None else with_vae(checkpoint, self._vae_source)

    @functools.cached_property
    def tokenizer(self):
        return self.checkpoint.tokenizer()

    @functools.cached_property
    def text_encoder(self):
        return self._part("text_encoder")

    @functools.cached_property
    def diffusion_model(self):
        return self._part("diffusion_model")

    @functools.cached_property
    def image_encoder(self):
        return self._part("image_encoder")

    @functools.cached_property
    def decoder(self):
        return self._part("decoder")

    @functools.cached_property
    def safety_checker(self):
        """The `SafetyChecker` that looks at all pictures, None without one."""
        if self._safety_checker_source in (None, False):
            return None
        from keras_sd.presets import locate_safety_checker
        from keras_sd.safety_checker import SafetyChecker

        return SafetyChecker(locate_safety_checker(self.preset, self._safety_checker_source))

    @functools.cached_property
    def safety_encoder(self):
        return self._part("safety_encoder", self.safety_checker.build_encoder)

    @functools.cached_property
    def image_prompt_encoder(self):
        return self._part("image_prompt_encoder", self._image_prompt.build_encoder)

    @functools.cached_property
    def scheduler(self):
        """(NoiseScheduler, sampler name, sampler options) of the preset."""
        # diffusers corrects old configs where it opens Stable Diffusion, but not for its upscaler.
        return read_scheduler_config(self.checkpoint.scheduler(), pipeline=self.checkpoint.upscaler() is None)

    @functools.cached_property
    def image_size(self):
        """Default (height, width) of the pictures in pixels."""
        height, width = self._size
        if None in self._size:
            height, width = (own or default for own, default in zip(self._size, self.checkpoint.image_size()))
        return height, width

    @property
    def img_height(self):
        return self.image_size[0]

    @property
    def img_width(self):
        return self.image_size[1]

    @property
    def denoiser(self):
        """The compiled denoising step around `diffusion_model`."""
        known = self.__dict__.get("_denoiser")
        if known is None or not self._fits(known):
            known = self._denoiser = self._new_denoiser()
        return known

    def _fits(self, denoiser):
        """Whether a step is one with the model and the options of now."""
        names = "diffusion_model", "cache_interval", "token_merging"
        return all(getattr(denoiser, name) == getattr(self, name) for name in names)

    def _controlled_denoiser(self, controls, guess_mode):
        """The step with ControlNets; that of the last ones is kept."""
        # diffusers' rule: a first network that averages its residuals over the picture brings all into that mode
        guess_mode = bool(guess_mode or controls[0].net.arguments["global_pool_conditions"])
        parts = [*(one.net for one in controls), guess_mode]
        known = self.__dict__.get("_controlled")
        if known is None or not self._fits(known) or [*known.control_nets, known.guess_mode] != parts:
            known = self._controlled = self._new_denoiser(parts[:-1], guess_mode)
        return known

    def _new_denoiser(self, control_nets=(), guess_mode=False):
        adapter = self._image_prompt and self._image_prompt.adapter
        options = self.two_pass_guidance, self.jit_compile, control_nets, guess_mode, adapter
        return Denoiser(self.diffusion_model, *options, self.cache_interval, self.token_merging)

    def _part(self, name, read=None):
        """Reads a model, by default from the checkpoint; where they are not kept, first gives up those read before."""
        if not self.keeps_models:
            for other, model in self._replaceable.items():
                if vars(self).get(other) is model:  # and not one that was assigned in its place
                    del vars(self)[other]
            self._replaceable.clear()
            self._forget_step(traces=True)
            model = None
            gc.collect()  # models and their compiled functions refer to each other
            trim()
        if name in self._reading:
            model = self._reading.pop(name).result()
        else:
            in_file = "diffusion_model" if self.low_memory else None if self.keeps_models else "text_encoder"
            # XLA cannot read a file
            with streamed() if name == in_file and not self.jit_compile else nullcontext():
                model = (read or getattr(self.checkpoint, name))(self.dtype)
        self._replaceable[name] = self._compiled(model)
        return model

    def read_ahead(self, *names, keep=True):
        """Starts to read models, one after the other, in a thread, which does not know the caller's scopes: not a
        dtype policy, a device or a strategy that was set for a block.

        Args:
            names: of the models, in the order in which they are going to be used.
            keep: False for whoever draws once: each model is given up when the next one is asked for, and the text
                encoder's weights stay in their file, on TensorFlow.
        """
        # KerasCV's folders tell by their weights alone what the models look like
        self.keeps_models = self.keeps_models and (keep or self.checkpoint.arguments is None)
        thread = ThreadPoolExecutor(1)
        for name in names:
            if name not in vars(self) and name not in self._reading and not self.low_memory:
                self._reading[name] = thread.submit(getattr(self.checkpoint, name), self.dtype)
        thread.shutdown(wait=False)

    def keep(self, *names):
        """Reads models whole and holds them, with `low_memory` too: they are going to be changed, or written."""
        for name in names:
            settle(getattr(self, name))
            self._replaceable.pop(name, None)

    def _argument(self, name, key):
        """One of the arguments that a model was or will be made with; where it can be, without reading the model."""
        known = name in vars(self) or self.checkpoint.arguments is None
        return (getattr(self, name).arguments if known else self.checkpoint.arguments(name))[key]

    def _compiled(self, model):
        model.compile(jit_compile=keras.backend.backend() == "jax" if self.jit_compile is None else self.jit_compile)
        return model

    def save_preset(self, folder, dtype=None):
        """Writes the model as a folder in the diffusers layout, which `from_preset` and diffusers open.

        Args:
            folder: where to; each file appears under its name when it is complete, `model_index.json` last.
            dtype: NumPy dtype of the weights, e.g. "float16"; by default that of the models. "int8" is the U-Net's, the
                others then keep theirs, and diffusers does not open it; see `keras_sd.weights.int8`.
        """
        from keras_sd.weights.diffusers_folder import write_folder

        write_folder(
            folder,
            self.tokenizer,
            self.text_encoder,
            self.diffusion_model,
            self.image_encoder,
            self.decoder,
            self.checkpoint.scheduler(),
            self.image_size,
            dtype,
            self.checkpoint.upscaler(),
            self.checkpoint.companions(),
        )

    def quantize(self):
        """Makes the U-Net's kernels int8, for good, as `save_preset` then writes them; see `keras_sd.weights.int8`.

        Raises:
            ValueError: LoRAs are loaded: they are fused or unloaded before.
        """
        if self.loras or lora_layers(self.diffusion_model):
            raise ValueError("quantize() makes loaded LoRAs a part of the weights: fuse_lora() or unload_lora() first.")
        self.keep("diffusion_model")
        quantize(self.diffusion_model)
        self._forget_step(traces=True)

    # === LoRA ===

    def load_lora(self, path, scale=1.0, name=None):
        """Merges a LoRA into the weights of the U-Net and the text encoder; several add up.

        Args:
            path: a file or folder in the naming of kohya, diffusers or PEFT; see `keras_sd.weights.lora`.
            scale: how much of it, any number.
            name: what to call it afterwards; by default the file's name without its ending, or the folder's.

        Returns:
            its name.

        Raises:
            FileNotFoundError, ValueError: nothing is there, it is no LoRA, or one for another architecture (the first
                key that does not fit is named); or the name is taken. No weight is changed then. Keys that say
                nothing about a layer are listed in a warning.
        """
        path = pathlib.Path(path)
        name = (path.stem if path.is_file() else path.name) if name is None else name
        self.keep("diffusion_model", "text_encoder")
        self._adapters.load(path, scale, name)
        self._forget_step()
        return name

    def set_lora_scale(self, name, scale):
        """Changes how much of a loaded LoRA is in the weights."""
        self._adapters.set_scale(name, scale)
        self._forget_step()

    def unload_lora(self, name=None):
        """Takes a LoRA out, or all, and factors to train with it: the weights are what they were, bit for bit."""
        self._adapters.unload(name)
        self._forget_step(traces=name is None and self._remove_factors())

    def fuse_lora(self):
        """Makes what is loaded, or was trained, a part of the weights, from which nothing takes it out any more."""
        self._adapters.fuse()
        self._forget_step(traces=self._remove_factors(fuse=True))

    def add_lora(self, rank=8, alpha=None, targets=("attention",), text_encoder=False, seed=0):
        """Adds trainable factors to the U-Net, and with `text_encoder` to the text encoder, and freezes all else.

        Args:
            rank, alpha, targets, seed: as in `keras_sd.lora.add_lora`; the text encoder gets the targets that it has.

        Returns:
            number of layers that have factors now.
        """
        targets = (targets,) if isinstance(targets, str) else targets
        self.keep("diffusion_model", *(["text_encoder"] if text_encoder else []))
        layers = add_lora(self.diffusion_model, rank, alpha, targets, seed)
        if text_encoder:
            targets = [target for target in targets if target_layers(self.text_encoder, target)]
            layers += add_lora(self.text_encoder, rank, alpha, targets, seed + len(layers))
        self._forget_step(traces=True)
        return len(layers)

    def save_lora(self, path, naming="kohya", dtype="float32"):
        """Writes the factors that `add_lora` added; see `keras_sd.weights.lora.write_lora`."""
        models = {"unet": self.diffusion_model, "text_encoder": self.text_encoder}
        factors = {(c, layer): f for c, model in models.items() for layer, f in lora_factors(model).items()}
        if not factors:
            raise ValueError("There are no LoRA factors to save: add_lora adds them.")
        write_lora(path, factors, naming, dtype)

    @property
    def loras(self):
        """dict name → scale of the loaded LoRAs."""
        return dict(self._adapters.scales)

    @functools.cached_property
    def _adapters(self):
        return Adapters({"unet": lambda: self.diffusion_model, "text_encoder": lambda: self.text_encoder})

    def _remove_factors(self, fuse=False):
        """Takes the factors of `add_lora` out of the models that are loaded; returns whether there were any."""
        loaded = [self.__dict__[name] for name in ("diffusion_model", "text_encoder") if name in self.__dict__]
        return any([remove_lora(model, fuse) for model in loaded])

    def _forget_step(self, traces=False):
        """The compiled step knows variables that are no longer used; OpenVINO's knows the values of all."""
        if traces or keras.backend.backend() == "openvino":
            self.__dict__.pop("_denoiser", None)
            self.__dict__.pop("_controlled", None)

    # === Textual inversion ===

    def load_textual_inversion(self, path, token=None):
        """Adds a token with vectors of its own, for prompts and negative prompts.

        Args:
            path: a file of diffusers or AUTOMATIC1111's web UI; see `keras_sd.weights.textual_inversion`.
            token: what to write in prompts, whatever its case; by default the file's own, or the file's name. Several
                vectors take as many of the 75 places of a chunk.

        Returns:
            the token.

        Raises:
            FileNotFoundError, ValueError: nothing is there, it is no textual inversion, or one for another
                architecture; or the token is in the vocabulary already.
        """
        token, vectors = read_textual_inversion(path, token)
        width = self.text_encoder.arguments["hidden_size"]
        if vectors.shape[1] != width:
            raise ValueError(
                f"{str(path)!r} holds vectors of {vectors.shape[1]} numbers; the text encoder needs {width}: "
                "it is for another architecture."
            )
        self.add_token(token, vectors)
        return token

    def add_token(self, token, vectors):
        """Adds a token to the tokenizer, and its vectors (n, width) to the text encoder; returns its ids."""
        if lora_layers(self.text_encoder):
            raise ValueError("The text encoder has LoRA factors to train; add tokens before them, or fuse them first.")
        first = self.text_encoder.arguments["vocab_size"]
        ids = [*range(first, first + len(vectors))]
        self.tokenizer = self.tokenizer.with_token(token, ids)
        self.text_encoder = self._compiled(self.text_encoder.with_tokens(vectors))
        self._adapters.move("text_encoder", self.text_encoder)
        return ids

    # === IP-Adapter ===

    def load_ip_adapter(self, path, image_encoder=None, scale=1.0):
        """Loads an IP-Adapter, in place of one that was loaded before: every call that draws then takes `image_prompt`.

        Args:
            path: `.safetensors` or `.bin` file of the base version, e.g. `ip-adapter_sd15.safetensors`, or
                `hf://owner/name/file`.
            image_encoder: folder of its CLIP vision encoder; by default `image_encoder/` beside the file.
            scale: how much of it, any number.

        Raises:
            FileNotFoundError, ValueError: something is not there, or is for another architecture; the first key that
                does not fit is named. Nothing is changed then.
        """
        from keras_sd.image_prompt import ImagePrompt

        check_number("scale", scale)
        loaded = ImagePrompt(path, image_encoder, self.diffusion_model, self.dtype)
        self.unload_ip_adapter()
        self._image_prompt = loaded
        self.set_ip_adapter_scale(scale)

    def set_ip_adapter_scale(self, scale):
        """Changes how much the picture counts beside the text."""
        check_number("scale", scale)
        if self._image_prompt is None:
            raise ValueError("No IP-Adapter is loaded; load_ip_adapter loads one.")
        self._image_prompt.adapter.scale.assign(scale)
        self._forget_step()

    def unload_ip_adapter(self):
        """Pictures are drawn as before `load_ip_adapter`, which changed no weight."""
        self._image_prompt = None
        self.__dict__.pop("image_prompt_encoder", None)
        self._forget_step(traces=True)
