# command:  torchrun --nproc_per_node=8 tools/train_segmentor.py \
#               configs/segmentation/vrwkv_tiny_upernet_ade20k_512_160k.py
# hardware: 8 GPUs
# time:     not run
# result:   not run
#
# The plain backbone with a feature pyramid, which the paper does not have: settings of the adapter's config.
# Starts from the authors' vrwkv_t_in1k_224.pth (huggingface.co/OpenGVLab/Vision-RWKV), which is to lie in pretrained/.
_base_ = "./_base_upernet_ade20k_512_160k.py"

model = dict(
    backbone=dict(
        type="VRWKV",
        model="vrwkv_tiny_patch16_224",
        model_args=dict(drop_path_rate=0.1, init_values=1.0),
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/vrwkv_t_in1k_224.pth"),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(decay_rate=0.95))
