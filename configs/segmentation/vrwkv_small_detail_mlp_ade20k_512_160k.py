# command:  torchrun --nproc_per_node=8 tools/train_segmentor.py \
#               configs/segmentation/vrwkv_small_detail_mlp_ade20k_512_160k.py
# hardware: 8 GPUs
# time:     not run
# result:   not run
#
# For large pictures, which it takes whole. The schedule is that of the adapter's config.
# Starts from the authors' vrwkv_s_in1k_224.pth (huggingface.co/OpenGVLab/Vision-RWKV), which is to lie in pretrained/.
_base_ = "./_base_detail_mlp_ade20k_512_160k.py"

model = dict(
    backbone=dict(
        model="vrwkv_small_patch16_224",
        model_args=dict(drop_path_rate=0.2),
        detail_width=32,
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/vrwkv_s_in1k_224.pth"),
    ),
    decode_head=dict(in_channels=[64, 128, 384]),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(decay_rate=0.85))
