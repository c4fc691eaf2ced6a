"""Example trainings: a small network on digits (the main job) and the paper's experiment, with one loop for both.

    digits, datasets     data
    models, vgg, resnet  networks with hand-written symmetries
    settings, train      settings, and the loop
    session              a run in a folder: it can be stopped and resumed
    main_job             the small network on digits
    experiment           the paper's experiment: a large network on a data set
    check                the main job's network with one batch, for `noetherperf check`

Only the command line and the gallery use them.
"""
