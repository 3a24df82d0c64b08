# ruff: noqa: C408
# Three criteria with weights, on layers of one's own choice, and a moving
# average of the network.
_base_ = "./distilled_cifar10.py"

model = dict(
    distill=[
        dict(type="DSLoss"),
        dict(type="KDLoss", temperature=4.0, weight=0.5),
        dict(type="AttentionTransferLoss", weight=100.0),
    ],
    layers=dict(intermediate="backbone.layer2"),
)
custom_hooks = [
    dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=0.002)
]
