# command:  torchrun --nproc_per_node=8 tools/train_segmentor.py \
#               configs/segmentation/vrwkv_adapter_tiny_upernet_ade20k_512_160k.py
# hardware: 8 GPUs
# time:     not run
# result:   not run
#
# Starts from the authors' vrwkv_t_in1k_224.pth (huggingface.co/OpenGVLab/Vision-RWKV), which is to lie in pretrained/.
# The authors trained in fp16 with a loss scale from 512 (--amp here).
_base_ = "./_base_upernet_ade20k_512_160k.py"

model = dict(
    backbone=dict(
        type="VRWKVAdapter",
        model="vrwkv_tiny_patch16_224",
        model_args=dict(drop_path_rate=0.1, init_values=1.0),
        conv_inplane=64,
        n_points=4,
        deform_num_heads=6,
        deform_ratio=1.0,
        cffn_ratio=0.25,
        interaction_indexes=[[0, 2], [3, 5], [6, 8], [9, 11]],
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/vrwkv_t_in1k_224.pth"),
    ),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
optim_wrapper = dict(optimizer=dict(lr=1.2e-4), paramwise_cfg=dict(decay_rate=0.95))
