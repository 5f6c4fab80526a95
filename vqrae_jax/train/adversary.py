"""The adversarial side of training: the discriminator's state and updates, and the generator's term."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.build import judges
from vqrae_jax.config import AdversaryConfig
from vqrae_jax.losses import adversarial
from vqrae_jax.losses.augment import augment
from vqrae_jax.models.discriminator import SPECTRAL
from vqrae_jax.train.objective import run_from
from vqrae_jax.train.optim import learning_rate, make_optimizer
from vqrae_jax.train.task import Metrics

State = dict[str, Any]  # params, opt_state, spectral, lecam


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator in training on images [b, H, W, 3] in [0, 1]; `network.params` do not train."""

    config: AdversaryConfig
    network: judges.FrozenNetwork

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """AdamW, whose schedule starts when the discriminator starts to train and ends with the run."""

        def rate(update: jax.Array, horizon: jax.Array) -> jax.Array:
            steps = jnp.maximum(horizon - self.config.start_steps, 1)
            return learning_rate(self.config.optimizer, update // self.config.disc_updates, steps)

        return make_optimizer(self.config.optimizer, rate)

    def init(self, key: jax.Array) -> State:
        variables = self.network.module.init(key, jnp.zeros((1, 32, 32, 3)))
        params = {name: tree for name, tree in variables["params"].items() if name not in self.network.params}
        lecam = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        opt_state, spectral = self.optimizer.init(params), variables.get(SPECTRAL, {})
        return {"params": params, "opt_state": opt_state, "spectral": spectral, "lecam": lecam}

    def generator_loss(self, state: State, frozen: Any, reconstruction: jax.Array, key: jax.Array) -> jax.Array:
        """Returns the generator's loss, which is small if the discriminator takes reconstructions for real images."""
        variables = {"params": {**frozen, **state["params"]}, SPECTRAL: state["spectral"]}
        logits = self.network.module.apply(variables, self._augment(reconstruction, key))
        return adversarial.GENERATOR[self.config.generator_loss](logits)

    def generator_term(
        self, state: State, frozen: Any, reconstruction: jax.Array, gradient: jax.Array,
        pull_to_last_layer: Callable[[jax.Array], jax.Array], step: jax.Array, key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Metrics]:  # fmt: skip
        """Returns the weighted adversarial term, its gradient with respect to the reconstruction, and metrics.

        `gradient` is that of the other terms; `pull_to_last_layer` maps one to that of the decoder's last kernel.
        """
        config = self.config
        loss = jax.value_and_grad(functools.partial(self.generator_loss, state, frozen, key=key))
        zeros = (jnp.zeros(()), jnp.zeros_like(reconstruction))
        value, slope = run_from(config.generator_start_steps, step, lambda: loss(reconstruction), zeros)
        weight = jnp.where(step >= config.generator_start_steps, config.weight, 0.0)
        if config.adaptive:
            norms = (pull_to_last_layer(gradient), pull_to_last_layer(slope))
            weight *= adversarial.adaptive_weight(*norms, config.adaptive_max)
        return weight * value, weight * slope, {"loss/adversarial": value, "gan/weight": weight}

    def update(
        self, state: State, frozen: Any, reconstructions: jax.Array, images: jax.Array,
        step: jax.Array, horizon: jax.Array, key: jax.Array,
    ) -> tuple[State, Metrics]:  # fmt: skip
        """Takes `disc_updates` optimizer steps on micro-batches [parts, b, H, W, 3], from step `start_steps` on."""

        def run() -> tuple[State, Metrics]:
            new, metrics = state, {}
            for update_key in jax.random.split(key, self.config.disc_updates):
                new, metrics = self._update(new, frozen, reconstructions, images, horizon, update_key)
            return new, metrics

        unchanged = (state, jax.tree.map(jnp.zeros_like, jax.eval_shape(run)[1]))
        return run_from(self.config.start_steps, step, run, unchanged)

    def loss(
        self, params: Any, state: State, frozen: Any, reconstruction: jax.Array, image: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Returns the discriminator's loss of a micro-batch, the state of its power iterations, and metrics.

        Reconstructions are rounded to the levels of 8-bit images, because images have no other values, by which alone a
        discriminator could classify them. The generator's loss is of unrounded ones.
        """
        config, fake = self.config, adversarial.round_to_levels(reconstruction)
        variables = {"params": {**frozen, **params}, SPECTRAL: state["spectral"]}
        all_logits, differences = [], []

        def classify(batch: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
            augmented = jax.lax.stop_gradient(self._augment(batch, key))
            return self.network.module.apply(variables, augmented, train=True, mutable=[SPECTRAL])

        # Reconstructions first: each pass takes one step of the power iteration, in the order of the PyTorch VQRAE.
        for batch, augment_key in zip((fake, image), jax.random.split(key), strict=True):
            logits, updated = classify(batch, augment_key)
            if config.consistency_weight:  # of the same network: the second pass repeats the step of the first
                other, _ = classify(batch, jax.random.fold_in(augment_key, 1))
                differences.append(adversarial.consistency(logits, other))
            variables = {**variables, **updated}
            all_logits.append(logits)
        fake, real = all_logits
        total = adversarial.DISCRIMINATOR[config.loss](real, fake)
        lecam = state["lecam"]
        metrics = {"gan/discriminator": total, "gan/logits_real": real.mean(), "gan/logits_fake": fake.mean()}
        metrics["gan/accuracy"] = 0.5 * ((real > 0).mean() + (fake < 0).mean())
        if config.lecam_weight:
            metrics["gan/lecam"] = adversarial.lecam(real, fake, lecam["real"], lecam["fake"])
            total = total + config.lecam_weight * metrics["gan/lecam"]
        if config.consistency_weight:
            metrics["gan/consistency"] = sum(differences) / 2
            total = total + config.consistency_weight * metrics["gan/consistency"]
        return total, (variables[SPECTRAL], metrics)

    def _update(
        self, state: State, frozen: Any, reconstructions: jax.Array, images: jax.Array, horizon: jax.Array,
        key: jax.Array,
    ) -> tuple[State, Metrics]:  # fmt: skip
        gradient = jax.grad(self.loss, has_aux=True)

        # The power iterations depend on the parameters only, so every micro-batch starts and ends them in one state.
        def add(carry: tuple[Any, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[Any, Any], Metrics]:
            grads, (spectral, metrics) = gradient(state["params"], state, frozen, *part)
            return (jax.tree.map(lambda t, g: t + g / len(images), carry[0], grads), spectral), metrics

        start = (jax.tree.map(jnp.zeros_like, state["params"]), state["spectral"])
        keys = jax.random.split(key, len(images))
        if len(images) == 1:
            (grads, spectral), metrics = add(start, (reconstructions[0], images[0], keys[0]))
        else:
            (grads, spectral), stacked = jax.lax.scan(add, start, (reconstructions, images, keys))
            metrics = jax.tree.map(lambda x: x.mean(0), stacked)
        decay = self.config.lecam_decay
        lecam = {n: decay * x + (1 - decay) * metrics[f"gan/logits_{n}"] for n, x in state["lecam"].items()}
        updates, opt_state = self.optimizer.update(grads, state["opt_state"], state["params"], horizon=horizon)
        params = optax.apply_updates(state["params"], updates)
        state = {**state, "params": params, "opt_state": opt_state, "spectral": spectral, "lecam": lecam}
        return state, {**metrics, "gan/grad_norm": optax.tree.norm(grads)}

    def _augment(self, images: jax.Array, key: jax.Array) -> jax.Array:
        return augment(images, key, self.config.augment, self.config.cutout) if self.config.augment else images
