"""The discriminator's side of training: its state, the loss it gives the generator, its own turns."""

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
from vqrae_jax.train.objective import after
from vqrae_jax.train.optim import learning_rate, make_optimizer
from vqrae_jax.train.task import Metrics

State = dict[str, Any]  # params, opt_state, spectral, lecam
LastLayer = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Adversary:
    """What a config says of the discriminator; `critic.params` are the parts of it that never train.

    Pictures are [b, H, W, 3] in [0, 1].
    """

    config: AdversaryConfig
    critic: judges.FrozenNetwork
    steps: int  # of the run

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self._rate)

    def _rate(self, update: jax.Array) -> jax.Array:
        """Its schedule begins where it starts to train, so that warm-up is its own, and ends with the run."""
        steps = max(self.steps - self.config.start_steps, 1)
        return learning_rate(self.config.optimizer, steps)(update // self.config.disc_updates)

    def create(self, key: jax.Array) -> State:
        """The state before the first turn."""
        variables = self.critic.module.init(key, jnp.zeros((1, 32, 32, 3)))
        params = {name: tree for name, tree in variables["params"].items() if name not in self.critic.params}
        return {
            "params": params,
            "opt_state": self.optimizer.init(params),
            "spectral": variables.get(SPECTRAL, {}),
            "lecam": {"real": jnp.zeros(()), "fake": jnp.zeros(())},
        }

    def generator_loss(self, state: State, frozen: Any, reconstruction: jax.Array, key: jax.Array) -> jax.Array:
        """Small where reconstructions are taken for pictures."""
        variables = {"params": {**frozen, **state["params"]}, SPECTRAL: state["spectral"]}
        logits = self.critic.module.apply(variables, self._augmented(reconstruction, key))
        return adversarial.GENERATOR[self.config.generator_loss](logits)

    def term(
        self, state: State, frozen: Any, picture: jax.Array, gradient: jax.Array, at_last_layer: LastLayer,
        step: jax.Array, key: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Metrics]:  # fmt: skip
        """The generator's term, weighted; its gradient with respect to the picture; what to log.

        Args:
          picture: the reconstruction [b, H, W, 3].
          gradient: of the other terms with respect to it.
          at_last_layer: a gradient with respect to the picture -> that with respect to the decoder's last kernel.
          step: of the tokenizer.
        """
        config = self.config
        judge = functools.partial(self.generator_loss, state, frozen, key=key)
        nothing = (jnp.zeros(()), jnp.zeros_like(picture))
        loss, own = after(config.generator_start_steps, step, lambda: jax.value_and_grad(judge)(picture), nothing)
        weight = jnp.where(step >= config.generator_start_steps, config.weight, 0.0)
        if config.adaptive:
            weight *= adversarial.adaptive_weight(at_last_layer(gradient), at_last_layer(own), config.adaptive_max)
        return weight * loss, weight * own, {"loss/adversarial": loss, "gan/weight": weight}

    def turn(
        self, state: State, frozen: Any, reconstructions: jax.Array, images: jax.Array, step: jax.Array, key: jax.Array
    ) -> tuple[State, Metrics]:
        """From its start on, `disc_updates` optimizer steps on what the tokenizer has just painted.

        Args:
          reconstructions, images: [parts, b, H, W, 3], micro-batches in front.
          step: of the tokenizer.
        """

        def run() -> tuple[State, Metrics]:
            after_it, metrics = state, {}
            for update_key in jax.random.split(key, self.config.disc_updates):
                after_it, metrics = self._update(after_it, frozen, reconstructions, images, update_key)
            return after_it, metrics

        metrics = jax.eval_shape(run)[1]
        waiting = (state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics))
        return after(self.config.start_steps, step, run, waiting)

    def loss(
        self, params: Any, state: State, frozen: Any, reconstruction: jax.Array, image: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[State, Metrics]]:
        """The discriminator's loss of a micro-batch, the state but for its parameters, and what to log."""
        c = self.config
        variables = {"params": {**frozen, **params}, SPECTRAL: state["spectral"]}
        logits = []
        # Reconstructions first: each pass takes one step of the power iteration, as PyTorch's order has it.
        for pictures, augment_key in zip((reconstruction, image), jax.random.split(key), strict=True):
            seen = jax.lax.stop_gradient(self._augmented(pictures, augment_key))
            given, updated = self.critic.module.apply(variables, seen, train=True, mutable=[SPECTRAL])
            variables = {**variables, **updated}
            logits.append(given)
        fake, real = logits
        total = adversarial.DISCRIMINATOR[c.loss](real, fake)
        means, lecam = {"real": real.mean(), "fake": fake.mean()}, state["lecam"]
        metrics = {"gan/discriminator": total, "gan/logits_real": means["real"], "gan/logits_fake": means["fake"]}
        metrics["gan/accuracy"] = 0.5 * ((real > 0).mean() + (fake < 0).mean())
        if c.lecam_weight:
            metrics["gan/lecam"] = adversarial.lecam(real, fake, lecam["real"], lecam["fake"])
            total = total + c.lecam_weight * metrics["gan/lecam"]
        lecam = {n: c.lecam_decay * lecam[n] + (1 - c.lecam_decay) * jax.lax.stop_gradient(means[n]) for n in lecam}
        return total, ({**state, "spectral": variables[SPECTRAL], "lecam": lecam}, metrics)

    def _update(
        self, state: State, frozen: Any, reconstructions: jax.Array, images: jax.Array, key: jax.Array
    ) -> tuple[State, Metrics]:
        gradient = jax.grad(self.loss, has_aux=True)

        def add(carry: tuple[Any, State], part: tuple[jax.Array, ...]) -> tuple[tuple[Any, State], Metrics]:
            total, state = carry
            grads, (state, metrics) = gradient(state["params"], state, frozen, *part)
            return (jax.tree.map(lambda t, g: t + g / len(images), total, grads), state), metrics

        start = (jax.tree.map(jnp.zeros_like, state["params"]), state)
        keys = jax.random.split(key, len(images))
        if len(images) == 1:
            (grads, state), metrics = add(start, (reconstructions[0], images[0], keys[0]))
        else:
            (grads, state), stacked = jax.lax.scan(add, start, (reconstructions, images, keys))
            metrics = jax.tree.map(lambda x: x.mean(0), stacked)
        updates, opt_state = self.optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {**state, "params": params, "opt_state": opt_state}, {**metrics, "gan/grad_norm": optax.tree.norm(grads)}

    def _augmented(self, pictures: jax.Array, key: jax.Array) -> jax.Array:
        return augment(pictures, key, self.config.augment, self.config.cutout) if self.config.augment else pictures
