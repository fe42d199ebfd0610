"""What every backend is measured against: a single-device loop in plain TensorFlow. It knows nothing of disttrain."""

import tensorflow as tf

CLIPS = {
    "none": lambda gradients, limit: gradients,
    "value": lambda gradients, limit: [tf.clip_by_value(g, -limit, limit) for g in gradients],
    "norm": lambda gradients, limit: [tf.clip_by_norm(g, limit) for g in gradients],
    "global_norm": lambda gradients, limit: tf.clip_by_global_norm(gradients, limit)[0],
}


def train(model, optimizer, mean_loss, batches, clip="none", limit=None, variables=None):
    """One optimizer step on every batch as a whole. Yields the model's weights before training and after each step.

    Args:
      mean_loss: (model, batch) -> scalar, the mean loss of the batch.
    """
    variables = model.trainable_variables if variables is None else variables
    yield [v.numpy() for v in variables]
    for batch in batches:
        with tf.GradientTape() as tape:
            loss = mean_loss(model, batch)
        gradients = tape.gradient(loss, [getattr(v, "_value", v) for v in variables])
        gradients = CLIPS[clip]([tf.convert_to_tensor(g) for g in gradients], limit)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        yield [v.numpy() for v in variables]
