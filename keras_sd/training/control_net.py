"""Training of a ControlNet: the U-Net stays as it is, a copy of its way down learns to see.

net = ControlNet.from_diffusion_model(sd.diffusion_model)
trainer = ControlNetTrainer(sd.diffusion_model, sd.scheduler[0], sd.text_encoder, sd.image_encoder, control_net=net)
trainer.compile(keras.optimizers.AdamW(1e-5))
trainer.fit(batches(Pictures(examples, sd.tokenizer, 512, 512, conditioning=canny), batch_size=4, epochs=10))
save_control_net(net, "runs/control_net")
"""

from keras import ops

from keras_sd.control import check_fit
from keras_sd.training.trainer import DiffusionTrainer


class ControlNetTrainer(DiffusionTrainer):
    """Trains a `ControlNet`, and nothing else, to predict the noise with the frozen U-Net.

    Args:
        diffusion_model, scheduler, text_encoder, image_encoder: as in `DiffusionTrainer`; all are frozen.
        control_net: a `ControlNet` for that U-Net, new (`ControlNet.from_diffusion_model`) or trained before.
        gradient_checkpointing: of both networks.
        **kwargs: as in `DiffusionTrainer`.

    Call arguments:
        as in `DiffusionTrainer`, and "conditioning" float32 (B, H, W, 3) in [0, 1], what the network sees.

    Raises:
        ValueError: the network is for another U-Net, or a batch lacks "conditioning".

    Reference: Zhang et al. (2023), arXiv 2302.05543, section 3.3.
    """

    def __init__(
        self,
        diffusion_model,
        scheduler,
        text_encoder=None,
        image_encoder=None,
        *,
        control_net,
        gradient_checkpointing=False,
        **kwargs,
    ):
        super().__init__(
            diffusion_model,
            scheduler,
            text_encoder,
            image_encoder,
            gradient_checkpointing=gradient_checkpointing,
            **kwargs,
        )
        arguments = diffusion_model.arguments
        check_fit(control_net, arguments.__getitem__, arguments["out_channels"], control_net.factor)
        diffusion_model.trainable, control_net.trainable = False, True
        if text_encoder is not None:
            text_encoder.trainable = False
        control_net.gradient_checkpointing = gradient_checkpointing
        self.control_net, self.controlled = control_net, diffusion_model.controlled

    def _predict(self, inputs, batch):
        if "conditioning" not in batch:
            raise ValueError(f'A batch must hold "conditioning", what the ControlNet sees; it holds {sorted(batch)}.')
        residuals = self.control_net({**inputs, "conditioning": ops.cast(batch["conditioning"], "float32")})
        return self.controlled({**inputs, "residuals": residuals})
