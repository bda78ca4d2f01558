// RoI max pooling (Girshick, "Fast R-CNN", section 2.1), as ONNX's MaxRoiPool and torchvision's roi_pool.
//
// features [B, C, H, W], rois [B, R, 4] float32 xyxy in image pixels, pooled [B * R, C, S, S]. Corners are
// scaled and rounded, half away from zero; the cells of a RoI overlap where its side is not a multiple of
// S; a cell without a pixel on the map is 0. A thread a value of the output.

// NaN becomes the lower bound; no coordinate of use lies outside, and each float inside is exact.
__device__ __forceinline__ int corner(float coordinate, float spatial_scale) {
  const float limit = 16777216.0f;
  return static_cast<int>(roundf(fminf(fmaxf(__fmul_rn(coordinate, spatial_scale), -limit), limit)));
}

// First and last pixel, from first up to and without last, of cell `cell` along one axis.
__device__ __forceinline__ int2 cell_range(int start, int end, int cell, int cells, int length) {
  const float size = __fdiv_rn(static_cast<float>(max(end - start + 1, 1)), static_cast<float>(cells));
  const int first = static_cast<int>(floorf(__fmul_rn(static_cast<float>(cell), size))) + start;
  const int last = static_cast<int>(ceilf(__fmul_rn(static_cast<float>(cell + 1), size))) + start;
  return make_int2(min(max(first, 0), length), min(max(last, 0), length));
}

// The kernel needs an order of the values only. Half precision is kept as its 16 bits: with the negative
// ones turned around they are in order as integers, and no header for half precision is needed.
struct Float32 {
  typedef float Value;
  static __device__ __forceinline__ Value lowest() { return -3.402823466e38f; }
  static __device__ __forceinline__ bool above(Value a, Value b) { return a > b; }
};

struct Float16 {
  typedef unsigned short Value;
  static __device__ __forceinline__ Value lowest() { return 0xfbff; }  // -65504
  static __device__ __forceinline__ int key(Value v) { return v & 0x8000 ? 0x8000 - v : v; }
  static __device__ __forceinline__ bool above(Value a, Value b) {
    return (a & 0x7fff) <= 0x7c00 && key(a) > key(b);  // NaN is above nothing
  }
};

template <typename Type>
__device__ __forceinline__ void pool(const typename Type::Value* features, const float4* rois,
                                     typename Type::Value* pooled, int rois_per_image, int channels, int height,
                                     int width, int cells, float spatial_scale, long long total) {
  const long long place = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place >= total) return;
  const int x_cell = static_cast<int>(place % cells), y_cell = static_cast<int>(place / cells % cells);
  const int channel = static_cast<int>(place / (cells * cells) % channels);
  const long long roi_index = place / (cells * cells) / channels;
  const float4 roi = rois[roi_index];
  const int2 xs = cell_range(corner(roi.x, spatial_scale), corner(roi.z, spatial_scale), x_cell, cells, width);
  const int2 ys = cell_range(corner(roi.y, spatial_scale), corner(roi.w, spatial_scale), y_cell, cells, height);
  const long long image = roi_index / rois_per_image;
  features += (image * channels + channel) * height * width;
  typename Type::Value highest = xs.x < xs.y && ys.x < ys.y ? Type::lowest() : 0;
  for (int y = ys.x; y < ys.y; ++y) {
    for (int x = xs.x; x < xs.y; ++x) {
      const typename Type::Value value = features[static_cast<long long>(y) * width + x];
      if (Type::above(value, highest)) highest = value;
    }
  }
  pooled[place] = highest;
}

extern "C" __global__ void __launch_bounds__(256)
    roi_pool_f32(const float* features, const float4* rois, float* pooled, int rois_per_image, int channels,
                 int height, int width, int cells, float spatial_scale, long long total) {
  pool<Float32>(features, rois, pooled, rois_per_image, channels, height, width, cells, spatial_scale, total);
}

extern "C" __global__ void __launch_bounds__(256)
    roi_pool_f16(const unsigned short* features, const float4* rois, unsigned short* pooled, int rois_per_image,
                 int channels, int height, int width, int cells, float spatial_scale, long long total) {
  pool<Float16>(features, rois, pooled, rois_per_image, channels, height, width, cells, spatial_scale, total);
}
