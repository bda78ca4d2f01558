// The project's kernels, built for the CPU; host_<kernel>(grid, threads, order, arguments...) runs one.

#include "cuda_on_host.h"

#include "nms.cu"
#include "preprocess.cu"
#include "roi_pool.cu"

#define LAUNCHER(kernel, parameters, ...)                                                  \
  extern "C" void host_##kernel parameters {                                               \
    host::launch(kernel, grid, threads, order, __VA_ARGS__);                               \
  }
#define WHERE const uint32_t *grid, uint32_t threads, int order

LAUNCHER(nms_overlaps, (WHERE, const float4* boxes, const float* scores, Word* tiles, int entries, float iou, float score),
         boxes, scores, tiles, entries, iou, score)
LAUNCHER(nms_select,
         (WHERE, const float4* boxes, const float* scores, const Word* tiles, float* kept, int entries, float score),
         boxes, scores, tiles, kept, entries, score)
LAUNCHER(nms_small, (WHERE, const float4* boxes, const float* scores, float* kept, int entries, float iou, float score),
         boxes, scores, kept, entries, iou, score)
LAUNCHER(roi_pool_f32,
         (WHERE, const float* features, const float4* rois, float* pooled, int per_image, int channels, int height,
          int width, int cells, float scale, long long total),
         features, rois, pooled, per_image, channels, height, width, cells, scale, total)
LAUNCHER(roi_pool_f16,
         (WHERE, const unsigned short* features, const float4* rois, unsigned short* pooled, int per_image, int channels,
          int height, int width, int cells, float scale, long long total),
         features, rois, pooled, per_image, channels, height, width, cells, scale, total)

#define PREPROCESSOR(kernel, Value)                                                                              \
  LAUNCHER(kernel,                                                                                               \
           (WHERE, const unsigned char* frame, const unsigned char* chroma, long long pitch, int height,         \
            int width, Value* canvas, int canvas_width, float* image_size, int valid_height, int valid_width,    \
            double scale_y, double scale_x),                                                                     \
           frame, chroma, pitch, height, width, canvas, canvas_width, image_size, valid_height, valid_width,     \
           scale_y, scale_x)
PREPROCESSOR(bgr_to_uint8, unsigned char)
PREPROCESSOR(bgr_to_float32, float)
#define NV12(colours)                                         \
  PREPROCESSOR(nv12_##colours##_to_uint8, unsigned char)      \
  PREPROCESSOR(nv12_##colours##_to_float32, float)
NV12(bt601)
NV12(bt601_full)
NV12(bt709)
NV12(bt709_full)
