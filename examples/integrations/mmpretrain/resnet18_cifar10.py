# ruff: noqa: C408
# An ordinary mmpretrain config without distillation: ResNet-18 on CIFAR-10.
# CIFAR10 names the folder that holds train/<class>/ and test/<class>/.
default_scope = "mmpretrain"

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR",
        depth=18,
        num_stages=4,
        out_indices=(3,),
        style="pytorch",
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=512,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
)
data_preprocessor = dict(
    num_classes=10,
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    to_rgb=True,
)

data_root = "{{$CIFAR10:data/cifar10}}"
train_dataloader = dict(
    batch_size=128,
    num_workers=2,
    dataset=dict(
        type="CustomDataset",
        data_root=data_root,
        data_prefix="train",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="PackInputs"),
        ],
    ),
    sampler=dict(type="DefaultSampler", shuffle=True),
    drop_last=True,
)
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    dataset=dict(
        type="CustomDataset",
        data_root=data_root,
        data_prefix="test",
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
val_evaluator = dict(type="Accuracy", topk=(1,))

optim_wrapper = dict(
    optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=5e-4)
)
param_scheduler = dict(type="CosineAnnealingLR", T_max=100, by_epoch=True)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=100),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
