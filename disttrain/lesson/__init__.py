"""The lesson of `disttrain why`: what hides the gradient goes wrong where training is distributed, measured live."""
