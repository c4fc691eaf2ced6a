"""Training to read as an example: the main job and the paper's experiment, which share one loop.

    digits, datasets     data
    models, vgg, resnet  networks, their symmetries written down by hand
    settings, train      settings, the loop, and the main job: a small network on digits
    experiment           the paper's: a large network on a data set, to be stopped and resumed
    check                the main job's network with one batch, for `noetherperf check`

Nothing else in the package needs them but the command line and the gallery.
"""
