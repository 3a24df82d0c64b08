# ruff: noqa: C408
# The same ResNet-18, and a ResNet-50 that helps it.
# TEACHER is the checkpoint, a path or a URL.
_base_ = "./resnet18_cifar10.py"
custom_imports = dict(imports=["structkd.integrations.mmpretrain"])

teacher = dict(
    type="ImageClassifier",
    backbone=dict(
        type="ResNet_CIFAR",
        depth=50,
        num_stages=4,
        out_indices=(3,),
        style="pytorch",
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=10, in_channels=2048),
)
model = dict(
    _delete_=True,
    type="structkd.DistilledClassifier",
    student={{_base_.model}},
    teacher=teacher,
    teacher_checkpoint="{{$TEACHER:}}",
    distill=[dict(type="DSLoss")],
    example_size=(3, 32, 32),
)
