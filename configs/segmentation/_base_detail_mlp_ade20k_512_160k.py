# What the configs of the detail segmentor share: SegFormer's all-MLP head on strides 4, 8 and 16, no auxiliary head,
# and whole pictures at their own size, large ones too, in place of windows of pictures brought to 512 pixels. Training
# brings them to a short side of 256 to 1024 pixels, which is near their own size in ADE20K: for other data see
# docs/segmentation.md.
_base_ = "./_base_upernet_ade20k_512_160k.py"

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(type="VRWKVDetail", norm_cfg=norm_cfg),
    decode_head=dict(
        _delete_=True,
        type="LeanSegformerHead",
        in_index=[0, 1, 2],
        channels=96,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    auxiliary_head=None,
    test_cfg=dict(_delete_=True, mode="whole"),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=factor, keep_ratio=True) for factor in (0.5, 0.75, 1.0, 1.25, 1.5)],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
