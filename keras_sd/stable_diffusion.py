"""The pipeline: what is drawn with the parts, from text, from pictures, and larger."""

import functools
import secrets

import keras
import numpy as np
from PIL import Image

from keras_sd import tiling
from keras_sd.arguments import check_integer, check_noise, check_scale, check_seed, check_strength, count
from keras_sd.control import check_fit, conditioning, control_scales, read_controls
from keras_sd.images import feathered, fit, read_image, to_model
from keras_sd.noise import initial_noise, lerp, row_noise, seeds_of, slerp
from keras_sd.parts import Parts
from keras_sd.presets import locate
from keras_sd.preview import clean_latent, fit_model, read_map, to_rgb
from keras_sd.prompts import as_list, by_row, emphasize, padded, segments, tokenize
from keras_sd.samplers import SamplerTable, make_table
from keras_sd.scheduler_config import read_scheduler_config
from keras_sd.super_resolution import enlarge
from keras_sd.weights.rrdbnet import read_rrdbnet

WHOLE = 2**20  # pixels that the autoencoder takes at once, unless it is told otherwise: one picture of 1024 × 1024


class StableDiffusion(Parts):
    """Draws pictures from text, with the API of `keras_cv.models.StableDiffusion`.

    Nothing is loaded before it is needed; every part (`tokenizer`, `text_encoder`, `diffusion_model`, `image_encoder`,
    `decoder`) can be replaced by assigning to it.

    Args:
        img_height, img_width: default size of the pictures in pixels, multiples of 8 (of 2 ** (levels - 1) for an
            autoencoder with another number of levels); by default that of the preset.
        jit_compile: compile the models with XLA; by default only on JAX.
        preset: name of a preset, a path, or `hf://owner/name`; see `from_preset`.
        dtype: Keras dtype policy of the models: "float32", "bfloat16", "float16"; by default Keras' own setting.
        tokenizer: merges file or `tokenizer/` folder, for checkpoints that carry none.
        two_pass_guidance: run the U-Net on the unconditional and the conditional half in sequence: half the memory.
        vae_slicing: encode and decode the pictures of a batch one after another; by default where they have more than
            2²⁰ pixels together.
        vae_tiling: encode and decode a picture in bands that overlap, with the same result (see `keras_sd.tiling`); by
            default where it has more than 2²⁰ pixels.
        low_memory: hold one of the four models at a time: each is read from the preset's files when its turn comes, and
            the one before is given up. On TensorFlow the U-Net's weights stay in their file, too, which must not change
            meanwhile: each is read when its layer runs. Implies slicing and, except on OpenVINO, tiling. Models that
            were assigned, or have LoRAs, are kept.
        vae: another autoencoder: folder, file or `hf://owner/name[/file]`; see `keras_sd.weights.vae`.
        safety_checker: True for the preset's own, or the folder or `hf://owner/name` of another one; by default
            pictures are not checked. Those that it flags come back black, and `flagged` then says which: a list with a
            bool per picture of the last call.
        cache_interval: faster, not exact: compute the whole U-Net in every so many-th row only, and reuse what its deep
            layers gave in the rows between; not with ControlNets. The attribute may be changed between calls.
        token_merging: faster for large pictures, not exact: the part of the tokens, 0 … 0.75, that self-attention at
            the highest resolution merges. The attribute may be changed between calls.

    Example:

        sd = StableDiffusion.from_preset("emoji")
        images = sd.text_to_image("red apple on a blue background", batch_size=4, num_steps=25, seed=7)
    """

    # === Text to image ===

    def text_to_image(
        self,
        prompt,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        seed=None,
        **kwargs,
    ):
        """Draws pictures from a prompt.

        Args:
            prompt: a string, or a list with one string per picture; weights, chunks and schedules are written as in
                `keras_sd.prompts`.
            negative_prompt: what to steer away from: a string, or a list with one string per picture.
            batch_size: number of pictures; with a list of prompts or seeds it follows from the list.
            num_steps: number of denoising steps.
            unconditional_guidance_scale: how closely to follow the prompt; 1 is no guidance.
            seed: integer, picture i of the batch being drawn from `seed + i`; or a list with one per picture. By
                default a random one.
            **kwargs: as in `generate_image`.

        Returns:
            uint8 (batch_size, height, width, 3).
        """
        return self.generate_image(
            as_list(prompt),
            negative_prompt=negative_prompt,
            batch_size=batch_size,
            num_steps=num_steps,
            unconditional_guidance_scale=unconditional_guidance_scale,
            seed=seed,
            **kwargs,
        )

    def encode_text(self, prompt):
        """Encodes a prompt, or a list of prompts, in the syntax of `keras_sd.prompts`.

        A prompt of more than 75 tokens goes on in further chunks of 77; the others of the list then get empty ones.

        Returns:
            float NumPy array (number of prompts, 77, width), 77 for each chunk, for `generate_image`.

        Raises:
            TypeError: the prompt is neither a string nor a list of strings.
            ValueError: brackets are not balanced, or the prompt is a schedule, which has a context for every step.
        """
        return self._encode([segments(one) for one in as_list(prompt)])

    def _encode(self, texts):
        """Results of `keras_sd.prompts.segments` → (number of texts, 77 · chunks, width)."""
        tokens, weights = (x.reshape(-1, x.shape[-1]) for x in tokenize(self.tokenizer, texts))
        context = np.asarray(self.text_encoder.predict_on_batch({"tokens": tokens}))
        return emphasize(context, weights).reshape(len(texts), -1, context.shape[-1])

    def generate_image(
        self,
        encoded_text,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        variation_seed=None,
        variation_strength=None,
        sampler=None,
        height=None,
        width=None,
        control=None,
        guess_mode=False,
        image_prompt=None,
        noise=None,
        callback=None,
        progress=True,
        hires=None,
        hires_strength=0.7,
        **sampler_options,
    ):
        """Draws pictures from an encoded prompt.

        Args:
            encoded_text: (N, width) or (batch_size, N, width), from `encode_text`; or a function row → such an array;
                or the prompt itself, as in `text_to_image`.
            negative_prompt: what to steer away from: a string, or a list with one string per picture.
            batch_size: number of pictures.
            num_steps: number of denoising steps.
            unconditional_guidance_scale: how closely to follow the prompt; 1 is no guidance (and half the work).
            diffusion_noise: unit noise to start from, (h, w, 4) or (batch_size, h, w, 4), instead of `seed`.
            seed: integer, picture i of the batch being drawn from `seed + i`; or a list with one per picture. By
                default a random one.
            variation_strength: 0 … 1, how far the initial noise is turned (spherically) from that of `seed` to that of
                `variation_seed`. An integer seed is then that of every picture, and picture i is varied towards
                `variation_seed + i`.
            variation_seed: integer or list, as `seed`.
            sampler: one of `keras_sd.SAMPLERS`, or a `SamplerTable` of one's own (then `num_steps`, guidance and
                options are the table's); by default the preset's.
            height, width: size in pixels; by default `img_height` and `img_width`.
            control: ControlNets that steer the picture, whose effects add up: list of (net, image), (net, image, scale)
                or (net, image, scale, start, end), see `keras_sd.control.Control`; nets come from `load_control_net`.
                An image of another size is scaled to cover the picture's, and its middle is taken.
            guess_mode: the ControlNets steer the conditional half only, and the less the earlier in the U-Net: for
                drawing without a prompt, at a guidance scale of 3 to 5.
            image_prompt: with an IP-Adapter, the picture it looks at, as `image` in `image_to_image`; or a list of as
                many as are drawn.
            noise: function row → unit noise (batch_size, h, w, 4) for stochastic samplers; by default from `seed`.
            callback: function (step, num_steps, latent), called after every step, a NumPy array (batch_size, h, w, 4)
                whose attribute `clean` is the latent that the network sees coming; `preview` shows it. The run stops
                where it returns False, and draws that one.
            progress: show a progress bar.
            hires: factor above 1 by which the latent is enlarged and then changed again before it is decoded ("hires
                fix"): from noise alone a model draws sizes badly that it was not trained at.
            hires_strength: how much the second pass changes, in (0, 1]; below 0.5 the enlarged latent stays blurred.
            **sampler_options: of `keras_sd.make_table`, e.g. `karras=True`, `eta=0.5`, `guidance_interval=(0, 0.8)`:
                guidance, and with it half the work, off in the last fifth of the rows.

        Returns:
            uint8 (batch_size, height, width, 3).

        Raises:
            ValueError, TypeError: an argument is out of its range; the message names it and says what would do.
        """
        shape = self.latent_shape(height, width)
        second_pass = None
        if hires is not None:
            if diffusion_noise is not None or noise is not None or isinstance(sampler, SamplerTable):
                raise ValueError("hires draws at two sizes: it takes a seed and a sampler's name, no noise, no table.")
            options = {**sampler_options, "strength": hires_strength}
            table = self._table(sampler, num_steps, unconditional_guidance_scale, options)
            second_pass = check_scale("hires", hires), table, _steps(sampler, num_steps, hires_strength)
        return self._draw(
            encoded_text,
            negative_prompt,
            batch_size,
            self._table(sampler, num_steps, unconditional_guidance_scale, sampler_options),
            shape,
            num_steps=_steps(sampler, num_steps, sampler_options.get("strength", 1.0)),
            diffusion_noise=diffusion_noise,
            seed=seed,
            variation=(variation_seed, variation_strength),
            noise=noise,
            callback=callback,
            progress=progress,
            second_pass=second_pass,
            control=control,
            guess_mode=guess_mode,
            image_prompt=image_prompt,
        )

    # === Image to image ===

    def image_to_image(
        self,
        image,
        prompt,
        strength=0.8,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        variation_seed=None,
        variation_strength=None,
        sampler=None,
        height=None,
        width=None,
        control=None,
        guess_mode=False,
        image_prompt=None,
        noise=None,
        callback=None,
        progress=True,
        latent_scale=None,
        **sampler_options,
    ):
        """Changes a picture.

        Args:
            image: path, PIL image or array (H, W, 3), uint8 0 … 255 or float 0 … 1. It is scaled to cover
                `height` × `width` and its middle is taken; without them it keeps its size, rounded down to a multiple
                of 8.
            prompt: what to draw: a string, or a list with one string per picture.
            strength: how much to change, in [0, 1]: the last part of the steps that is run. 0 gives the picture back
                as the autoencoder has it.
            latent_scale: factor above 1 by which the picture's latent is enlarged first; see `upscale`.
            Others: as in `generate_image`.

        Returns:
            uint8 (batch_size, height, width, 3).
        """
        check_strength(strength)
        picture = self._fitted(image, height, width)
        known = self.encode(picture)
        if latent_scale is not None:
            known = _resized(known, check_scale("latent_scale", latent_scale))
        if strength == 0:
            copies = count(batch_size, prompts=as_list(prompt), negative_prompts=negative_prompt, seeds=seed)
            return self._checked(np.repeat(self.decode(known), copies, axis=0))
        options = {**sampler_options, "strength": strength}
        return self._draw(
            as_list(prompt),
            negative_prompt,
            batch_size,
            self._table(sampler, num_steps, unconditional_guidance_scale, options),
            known.shape[1:],
            num_steps=_steps(sampler, num_steps, strength),
            diffusion_noise=diffusion_noise,
            seed=seed,
            variation=(variation_seed, variation_strength),
            noise=noise,
            callback=callback,
            progress=progress,
            known=known,
            control=control,
            guess_mode=guess_mode,
            image_prompt=image_prompt,
        )

    def inpaint(
        self,
        image,
        mask,
        prompt,
        strength=1.0,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        feather=0,
        variation_seed=None,
        variation_strength=None,
        sampler=None,
        height=None,
        width=None,
        control=None,
        guess_mode=False,
        image_prompt=None,
        noise=None,
        callback=None,
        progress=True,
        **sampler_options,
    ):
        """Repaints a part of a picture; every pixel outside the mask comes back as it was.

        Works with any model, by blending the known part in after every row (Lugmayr et al., 2022, arXiv 2201.09865,
        equation 8), and with inpainting models, whose U-Net sees the mask and the masked picture (9 channels).

        Args:
            image: as in `image_to_image`.
            mask: picture of the same size; white (128 and above) is repainted.
            feather: pixels inside the mask, from its edge on, over which the old picture fades into the new one.
            prompt: what to draw there: a string, or a list with one string per picture.
            strength: in (0, 1]; below 1 the repainted part starts from what was there.
            Others: as in `generate_image`.

        Returns:
            uint8 (batch_size, height, width, 3).
        """
        if check_strength(strength) == 0:
            raise ValueError("strength must be above 0 for inpaint; got 0.")
        image, mask = read_image(image), read_image(mask, "mask")
        if mask.size != image.size:
            sizes = (f"{one.width} × {one.height}" for one in (mask, image))
            raise ValueError("mask has {} pixels and the image {}; they must be alike.".format(*sizes))
        picture = self._fitted(image, height, width)
        mask = np.asarray(fit(mask, picture.height, picture.width, self.factor).convert("L")) >= 128
        if not mask.any():
            raise ValueError("mask is empty: nothing in it is white (128 or more), so there is nothing to repaint.")
        weights = feathered(mask, check_integer("feather", feather, 0))[..., None]
        known = self.encode(picture)
        repaint = mask[:: self.factor, :: self.factor]
        if not repaint.any():  # it falls between the pixels that stand for the latent's positions
            repaint = mask.reshape(len(repaint), self.factor, -1, self.factor).any(axis=(1, 3))
        repaint = repaint[..., None].astype("float32")
        extra = None
        if self._argument("diffusion_model", "in_channels") == 2 * known.shape[-1] + 1:
            masked = self.encode(np.where(mask[..., None], 0.0, to_model(picture)))
            extra = np.concatenate([repaint[None], masked], axis=-1)
        drawn = self._draw(
            as_list(prompt),
            negative_prompt,
            batch_size,
            self._table(sampler, num_steps, unconditional_guidance_scale, {**sampler_options, "strength": strength}),
            known.shape[1:],
            num_steps=_steps(sampler, num_steps, strength),
            diffusion_noise=diffusion_noise,
            seed=seed,
            variation=(variation_seed, variation_strength),
            noise=noise,
            callback=callback,
            progress=progress,
            known=known if strength < 1 else None,
            extra=extra,
            keep=None if extra is not None else (known, repaint),
            control=control,
            guess_mode=guess_mode,
            image_prompt=image_prompt,
        )
        blended = np.round(weights * drawn + (1.0 - weights) * np.asarray(picture, "float32")).astype("uint8")
        if self.flagged is not None:
            blended[self.flagged] = 0
        return blended

    # === Enlarging ===

    def upscale(
        self,
        image,
        prompt=None,
        scale=None,
        model=None,
        *,
        strength=None,
        noise_level=None,
        image_noise=None,
        tile=192,
        **kwargs,
    ):
        """Enlarges a picture, in one of four ways.

        | given | what happens |
        |---|---|
        | `prompt` | the picture's latent is enlarged and then changed as by `image_to_image` |
        | `model` | a super-resolution network enlarges the picture; nothing of the preset is loaded |
        | `model`, `prompt` | the network's picture is changed as by `image_to_image` |
        | a preset that is a ×4 upscaler | it draws the large picture, looking at the small one with noise over it |

        Args:
            image: path, PIL image or array (H, W, 3), uint8 0 … 255 or float 0 … 1.
            prompt: what the picture shows: a string, or a list with one string per picture. A ×4 upscaler does without.
            scale: how many times as high and as wide, above 1. By default 2 for a latent; networks and ×4 upscalers
                have their own, and their pictures are resized (Lanczos) for another.
            model: `.pth` or `.safetensors` file of Real-ESRGAN or ESRGAN, or a `keras_sd.RRDBNet`.
            strength: how much to change after enlarging, in [0, 1]. By default 0.7 for a latent, which stays blurred
                below 0.5, and 0.35 for a network's picture.
            noise_level: for a ×4 upscaler, how much noise lies over the small picture: an integer from 0 (the result is
                closest to it) to the model's largest, usually 350. By default 20.
            image_noise: that noise, (H, W, 3) or (batch_size, H, W, 3), instead of one from `seed`.
            tile: side in pixels of the tiles that a network works on.
            **kwargs: `negative_prompt`, `batch_size`, `num_steps`, `seed`, `sampler` and so on, as in `image_to_image`.

        Returns:
            uint8 (batch_size, scale · H, scale · W, 3); with a latent, H and W are rounded down as in `image_to_image`.

        Raises:
            ValueError, TypeError: an argument is out of its range, or is not for the chosen way.

        Reference: Rombach et al. (2022), arXiv 2112.10752, section 4.4 (upscaler); `keras_sd.RRDBNet` (network).
        """
        image = read_image(image)
        scale = None if scale is None else check_scale("scale", scale)
        upscaler = None if model is not None and prompt is None else self.checkpoint.upscaler()
        if upscaler is not None and (model is not None or strength is not None):
            raise ValueError("This preset is a ×4 upscaler, which takes no model and no strength, but a noise_level.")
        if upscaler is None and (noise_level is not None or image_noise is not None):
            raise ValueError("noise_level and image_noise are for presets that are a ×4 upscaler; this one is not.")
        if upscaler is not None:
            noise_level = 20 if noise_level is None else noise_level
            prompt = "" if prompt is None else prompt
            pictures = self._draw_beside(image, prompt, upscaler, noise_level, image_noise, **kwargs)
            return _scaled(pictures, image, scale)
        if model is None:
            if prompt is None:
                raise ValueError("upscale needs a prompt that says what the picture shows, or a model (RRDBNet).")
            return self.image_to_image(
                image, prompt, 0.7 if strength is None else strength, latent_scale=scale or 2, **kwargs
            )
        if prompt is None and (kwargs or strength is not None):
            names = ", ".join([*kwargs, *([] if strength is None else ["strength"])])
            raise ValueError(f"upscale uses {names} only with a prompt; a model alone just enlarges.")
        network = model if isinstance(model, keras.Model) else self._compiled(read_rrdbnet(model, self.dtype))
        pictures = _scaled(enlarge(image, network, tile)[None], image, scale)
        if prompt is None:
            return pictures
        return self.image_to_image(pictures[0], prompt, 0.35 if strength is None else strength, **kwargs)

    def _draw_beside(
        self,
        image,
        prompt,
        upscaler,
        noise_level,
        image_noise=None,
        negative_prompt=None,
        batch_size=1,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        diffusion_noise=None,
        seed=None,
        *,
        sampler=None,
        noise=None,
        callback=None,
        progress=True,
        **sampler_options,
    ):
        """Draws with a ×4 upscaler: its network sees the noised small picture beside the latent of the same size."""
        config, most = upscaler
        if check_integer("noise_level", noise_level, 0) > most:
            raise ValueError(f"noise_level must be at most {most} for this model; got {noise_level}.")
        batch_size = count(batch_size, prompts=as_list(prompt), negative_prompts=negative_prompt, seeds=seed)
        small = np.repeat(to_model(image), batch_size, axis=0)
        if image_noise is None:
            own_seed = secrets.randbits(31) if seed is None else check_seed("seed", seed)
            seed = own_seed if diffusion_noise is None else seed
            generators = (np.random.default_rng((one, 1)) for one in seeds_of(own_seed, batch_size))
            image_noise = np.stack([g.standard_normal(small.shape[1:], dtype="float32") for g in generators])
        else:
            image_noise = check_noise(image_noise, small.shape, "image_noise")
        return self._draw(
            prompt,
            negative_prompt,
            batch_size,
            self._table(sampler, num_steps, unconditional_guidance_scale, sampler_options),
            (image.height, image.width, self._argument("decoder", "latent_channels")),
            num_steps=_steps(sampler, num_steps, sampler_options.get("strength", 1.0)),
            diffusion_noise=diffusion_noise,
            seed=seed,
            noise=noise,
            callback=callback,
            progress=progress,
            extra=read_scheduler_config(config)[0].add_noise(small, image_noise, noise_level),
            class_label=np.full(batch_size, noise_level, "int32"),
        )

    # === Interpolation ===

    def interpolate(
        self,
        prompt,
        to_prompt=None,
        seed=None,
        to_seed=None,
        frames=9,
        negative_prompt=None,
        num_steps=50,
        unconditional_guidance_scale=7.5,
        *,
        batch_size=4,
        sampler=None,
        height=None,
        width=None,
        image_prompt=None,
        callback=None,
        progress=True,
        **sampler_options,
    ):
        """Draws the pictures between two prompts, two seeds, or both.

        Contexts are interpolated linearly, noise spherically. The first and last picture are those that
        `text_to_image` draws of either prompt and seed. `keras_sd.film` makes a strip or an animation of them.

        Args:
            prompt, to_prompt: strings, the first and the last; by default the same.
            seed, to_seed: integers, the first and the last; by default the same, and a random one.
            frames: number of pictures, at least 2.
            batch_size: the most pictures that are drawn at once.
            callback: as in `generate_image`, of each batch; where it returns False no further pictures are drawn.
            Others: as in `generate_image`.

        Returns:
            uint8 (frames, height, width, 3).

        Raises:
            ValueError, TypeError: there is nothing to go to, or an argument is out of its range.
        """
        if to_prompt is None and to_seed is None:
            raise ValueError("interpolate needs to_prompt or to_seed, the prompt or seed that it goes to.")
        prompts = [prompt, prompt if to_prompt is None else to_prompt]
        for name, one in zip(("prompt", "to_prompt"), prompts):
            if not isinstance(one, str):
                raise TypeError(f"{name} must be a string; got {one!r}.")
        seed = secrets.randbits(31) if seed is None else check_integer("seed", seed, 0)
        seeds = [seed, seed if to_seed is None else check_integer("to_seed", to_seed, 0)]
        batches = -(-check_integer("frames", frames, 2) // check_integer("batch_size", batch_size, 1))
        shape = self.latent_shape(height, width)
        table = self._table(sampler, num_steps, unconditional_guidance_scale, sampler_options)
        steps = _steps(sampler, num_steps, sampler_options.get("strength", 1.0)) or len(table)
        contexts = by_row(prompts, self._encode, steps, len(table))
        start, fresh = initial_noise(seeds, 2, shape), row_noise(seeds, 2, shape, table)
        stopped = False

        def watch(*args):
            nonlocal stopped
            stopped = callback is not None and callback(*args) is False
            return not stopped

        def draw(positions):
            def between(mix, ends):
                return np.stack([mix(*ends, position) for position in positions])

            return self._draw(
                lambda row: between(lerp, contexts(row)),
                negative_prompt,
                len(positions),
                table,
                shape,
                num_steps=steps,
                diffusion_noise=between(slerp, start),
                seed=None,
                noise=lambda row: between(slerp, fresh(row)),
                callback=watch,
                progress=progress,
                image_prompt=image_prompt,
            )

        drawn, flagged = [], []
        for positions in np.array_split(np.linspace(0.0, 1.0, frames), batches):
            if not stopped:
                drawn.append(draw(positions))
                flagged += self.flagged or []
        self.flagged = None if self.flagged is None else flagged
        return np.concatenate(drawn)

    # === Latents ===

    def encode(self, image):
        """Encodes a PIL image or an array (B, H, W, 3) in [-1, 1] to scaled latents (B, h, w, 4)."""
        image = to_model(image) if hasattr(image, "getpixel") else image
        return self._in_pieces(self.image_encoder, tiling.encode, image, np.prod(image.shape[1:3]))

    def decode(self, latent):
        """Decodes scaled latents (B, h, w, 4) to uint8 pictures (B, H, W, 3), rounded to the nearest value."""
        image = self._in_pieces(self.decoder, tiling.decode, latent, np.prod(latent.shape[1:3]) * self.factor**2)
        return np.clip(np.round((image + 1.0) * 127.5), 0, 255).astype("uint8")

    def _in_pieces(self, model, tiled, batch, pixels):
        """One half of the autoencoder on a batch of pictures, each of so many pixels; float32."""
        tile = pixels > WHOLE if self.vae_tiling is None else self.vae_tiling and pixels > tiling.BAND
        slice_ = len(batch) * pixels > WHOLE if self.vae_slicing is None else self.vae_slicing
        run = functools.partial(tiled, model) if tile else model.predict_on_batch
        pieces = np.split(np.asarray(batch), len(batch)) if tile or slice_ else [batch]
        result = np.concatenate([np.asarray(run(piece), "float32") for piece in pieces])
        model.release_memory()
        return result

    def preview(self, latent):
        """What latents show, without the decoder: in a callback, or to look over many.

        The colours are a linear map of each position's channels, fitted by least squares to the decoder's own pictures,
        averaged to the latent's size. A preset that ships its map (`preview.json`) had it fitted on latents it drew;
        for another one that happens at the first call, on some fields of random colours that the autoencoder encodes.

        Args:
            latent: (B, h, w, C), clean and scaled; or what a callback was given, whose `clean` is shown.

        Returns:
            uint8 (B, h, w, 3).
        """
        return to_rgb(getattr(latent, "clean", latent), self._preview_map)

    @functools.cached_property
    def _preview_map(self):
        known = None if self.preset is None or self._vae_source else read_map(locate(self.preset))
        return fit_model(self) if known is None else known

    @functools.cached_property
    def factor(self):
        """Pixels per latent position, in height and width."""
        return 2 ** (len(self._argument("decoder", "block_out_channels")) - 1)

    def latent_shape(self, height=None, width=None):
        """(h, w, channels) of the latents of pictures of a size in pixels, by default `image_size`."""
        height, width = (self.image_size[i] if side is None else side for i, side in enumerate((height, width)))
        for name, side in (("height", height), ("width", width)):
            check_integer(name, side, 1)
            if side % self.factor:
                lower = max(side // self.factor, 1) * self.factor
                raise ValueError(
                    f"{name} must be a multiple of {self.factor}; got {side}. "
                    f"{lower} or {lower + self.factor} would do."
                )
        return height // self.factor, width // self.factor, self._argument("decoder", "latent_channels")

    # === Inside ===

    def _draw(self, *arguments, seed, callback, second_pass=None, **kwargs):
        """The denoising loop and the decoder: everything that draws a picture ends here.

        `second_pass` is a (scale, table, number of steps): the latent is enlarged and denoised once more. Others: as in
        `_denoised`.
        """
        if second_pass is None:
            return self._checked(self.decode(self._denoised(*arguments, seed=seed, callback=callback, **kwargs)))
        seed = secrets.randbits(31) if seed is None else seed
        stopped = False

        def watch(*args):
            nonlocal stopped
            stopped = callback is not None and callback(*args) is False
            return not stopped

        latent = self._denoised(*arguments, seed=seed, callback=watch, **kwargs)
        if not stopped:
            scale, table, kwargs["num_steps"] = second_pass
            known = _resized(latent, scale)
            arguments = *arguments[:3], table, known.shape[1:]
            latent = self._denoised(*arguments, seed=seed, callback=callback, known=known, **kwargs)
        return self._checked(self.decode(latent))

    def _checked(self, pictures):
        """The pictures, those black that the safety checker flags."""
        self.flagged = None
        if self.safety_checker is not None:
            embeddings = self.safety_encoder.predict_on_batch(self.safety_checker.prepare(pictures))
            self.flagged = self.safety_checker.flags(embeddings).tolist()
            pictures[self.flagged] = 0
        return pictures

    def _denoised(
        self,
        encoded_text,
        negative_prompt,
        batch_size,
        table,
        shape,
        *,
        num_steps,
        diffusion_noise,
        seed,
        noise,
        callback,
        progress,
        variation=(None, None),
        known=None,
        extra=None,
        class_label=None,
        keep=None,
        control=None,
        guess_mode=False,
        image_prompt=None,
    ):
        """Noise and the denoising loop; returns the latent.

        `known` (1 or B, h, w, C) is the latent to start from, `keep` a (latent, mask) to blend in where the mask is 0.
        """
        self._check_channels(shape[-1] + (0 if extra is None else extra.shape[-1]))
        controls, steering = self._controls(control, shape, len(table))
        negative_prompt = as_list("" if negative_prompt is None else negative_prompt, "negative_prompt")
        batch_size = count(batch_size, prompts=encoded_text, negative_prompts=negative_prompt, seeds=seed)
        if diffusion_noise is not None and (seed, *variation) != (None, None, None):
            raise ValueError(
                "diffusion_noise and seed, varied or not, exclude each other: seed makes the noise; give one of them."
            )
        seed, start = _seeded_noise(seed, variation, batch_size, shape)
        if diffusion_noise is not None:
            start = check_noise(diffusion_noise, (batch_size, *shape))
        rows = len(table)
        contexts = (by_row(one, self._encode, num_steps or rows, rows) for one in (encoded_text, negative_prompt))
        contexts = padded(*contexts, self._encode, batch_size)
        context, unconditional_context = self._with_image_prompt(contexts, image_prompt, batch_size)
        latent = table.init_noise_scale * start
        if known is not None:
            latent = table.signal[0] * known + table.sigma[0] * start

        def blend(row, latent):
            signal, sigma = table.levels[row + 1]
            return keep[1] * latent + (1.0 - keep[1]) * (signal * keep[0] + sigma * start)

        denoiser = self._controlled_denoiser(controls, guess_mode) if controls else self.denoiser
        try:
            return denoiser.denoise(
                latent,
                context,
                unconditional_context,
                table,
                noise=noise or row_noise(seed, batch_size, shape, table),
                extra=None if extra is None else np.repeat(extra, batch_size // len(extra), axis=0),
                class_label=class_label,
                blend=None if keep is None else blend,
                callback=callback,
                estimate=lambda *row: clean_latent(table, self.scheduler[0].prediction_type, *row),
                progress=progress,
                **steering,
            )
        finally:
            denoiser.release_memory()

    def _with_image_prompt(self, contexts, image_prompt, batch_size):
        """The contexts, functions of the row, with the tokens of the picture, and of none in the unconditional one."""
        if self._image_prompt is None:
            if image_prompt is not None:
                raise ValueError("image_prompt needs an IP-Adapter; load_ip_adapter loads one.")
            return contexts
        if image_prompt is None:
            raise ValueError("An IP-Adapter is loaded: give image_prompt, the picture it looks at, or unload it.")
        pixels = self._image_prompt.prepare(image_prompt, batch_size)
        tokens = self._image_prompt.tokens(self.image_prompt_encoder.predict_on_batch(pixels), batch_size)

        def extended(context, tokens, row):
            return np.concatenate([context(row), tokens], axis=1)

        return [functools.partial(extended, *one) for one in zip(contexts, tokens)]

    def _controls(self, control, shape, rows):
        """`control` as a list of `Control`, checked, and what of them is an argument of `Denoiser.denoise`."""
        controls, unet = read_controls(control), functools.partial(self._argument, "diffusion_model")
        for one in controls:
            check_fit(one.net, unet, shape[-1], self.factor)
        if not controls:
            return [], {}
        height, width = (side * self.factor for side in shape[:2])
        pictures = conditioning(controls, height, width, self.factor)
        return controls, {"conditioning": pictures, "control_scales": control_scales(controls, rows)}

    def _check_channels(self, channels):
        """Raises where the network is made for other pictures to look at than it gets."""
        needed = self._argument("diffusion_model", "in_channels")
        if channels != needed:
            purpose = "enlarging: use upscale" if self.checkpoint.upscaler() else "repainting: use inpaint"
            raise ValueError(f"This preset's network takes {needed} channels, not {channels}: it is for {purpose}.")

    def _fitted(self, image, height, width):
        if height is not None or width is not None:
            self.latent_shape(height, width)
        return fit(read_image(image), height, width, self.factor)

    def _table(self, sampler, num_steps, guidance_scale, options):
        if isinstance(sampler, SamplerTable):
            return sampler
        scheduler, name, own_options = self.scheduler
        options = {**(own_options if sampler is None else {}), **options}
        name = name if sampler is None else sampler
        return make_table(name, scheduler, num_steps, guidance_scale=guidance_scale, **options)


def _steps(sampler, num_steps, strength):
    """Number of steps of a run, by which prompts are scheduled; None, which is that of its rows, for a table."""
    return None if isinstance(sampler, SamplerTable) else int(num_steps * strength)


def _seeded_noise(seed, variation, batch_size, shape):
    """The seeds as an integer or list, and the initial noise (batch_size, h, w, C), varied."""
    seed = secrets.randbits(31) if seed is None else check_seed("seed", seed)
    variation_seed, strength = variation
    if strength is None:
        if variation_seed is not None:
            raise ValueError("variation_seed needs a variation_strength: how far to vary, 0 … 1.")
        return seed, initial_noise(seed, batch_size, shape)
    check_strength(strength, "variation_strength")
    variation_seed = secrets.randbits(31) if variation_seed is None else check_seed("variation_seed", variation_seed)
    seed = [seed] * batch_size if isinstance(seed, int) else seed
    ends = (initial_noise(one, batch_size, shape) for one in (seed, variation_seed))
    return seed, np.stack([slerp(*pair, strength) for pair in zip(*ends)])


def _resized(latent, scale):
    """Enlarges latents (B, h, w, C), bilinear: nearest neighbours would show as squares, Lanczos as rings."""
    size = tuple(round(scale * side) for side in latent.shape[1:3])
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.image.resize(latent, size, interpolation="bilinear")))


def _scaled(pictures, image, scale):
    """Pictures of a network (B, H, W, 3) at another scale of the PIL image that they are of; None leaves them."""
    size = pictures.shape[2:0:-1] if scale is None else (round(scale * image.width), round(scale * image.height))
    if size == pictures.shape[2:0:-1]:
        return pictures
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in pictures])
