// A frame onto the canvas, the padded fixed-size input of the network: what anchorline/runtime/canvas.py
// does on the CPU. One thread a canvas pixel.
//
// Frames are uint8, BGR [H, W, 3] or NV12 (a plane of luma [H, W], then one of chroma pairs [H/2, W]),
// with any number of bytes from row to row. The frame is resized bilinearly into the top left
// valid_height x valid_width of the canvas [CH, CW, 3]; the rest becomes zero. The canvas is uint8, rounded
// (within one grey level of OpenCV, which weighs with 11 bits), or float32 (PyTorch's arithmetic, operation by
// operation: hence the double precision, rounded once). image_size, the network's other input, receives the
// valid height and width.

struct Pixel {
  float b, g, r;
};

struct Bgr {
  static __device__ __forceinline__ Pixel read(const unsigned char* frame, const unsigned char*, long long pitch,
                                               int x, int y) {
    const unsigned char* pixel = frame + y * pitch + 3 * x;
    return {static_cast<float>(pixel[0]), static_cast<float>(pixel[1]), static_cast<float>(pixel[2])};
  }
};

__device__ __forceinline__ float grey_level(int scaled) {
  const int level = scaled >> 20;
  return static_cast<float>(level < 0 ? 0 : level > 255 ? 255 : level);
}

// Matrix and range of ITU-R, the luma of black and factors with 20 binary places: anchorline/runtime/nv12.py.
// BT.601 in its limited range is OpenCV's COLOR_YUV2BGR_NV12.
struct Bt601 {
  static constexpr int black = 16, luma = 1220542, u_to_b = 2116026, u_to_g = -409993, v_to_g = -852492,
                       v_to_r = 1673527;
};
struct Bt601Full {
  static constexpr int black = 0, luma = 1048576, u_to_b = 1858077, u_to_g = -360853, v_to_g = -748826,
                       v_to_r = 1470104;
};
struct Bt709 {
  static constexpr int black = 16, luma = 1220945, u_to_b = 2215014, u_to_g = -223607, v_to_g = -558796,
                       v_to_r = 1879825;
};
struct Bt709Full {
  static constexpr int black = 0, luma = 1048576, u_to_b = 1945738, u_to_g = -196424, v_to_g = -490864,
                       v_to_r = 1651297;
};

template <typename Colours>
struct Nv12 {
  static __device__ __forceinline__ Pixel read(const unsigned char* luma, const unsigned char* chroma,
                                               long long pitch, int x, int y) {
    const unsigned char* pair = chroma + (y / 2) * pitch + (x / 2) * 2;
    const int above_black = static_cast<int>(luma[y * pitch + x]) - Colours::black;
    const int grey = (above_black < 0 ? 0 : above_black) * Colours::luma;
    const int u = static_cast<int>(pair[0]) - 128, v = static_cast<int>(pair[1]) - 128;
    const int half = 1 << 19;
    return {grey_level(grey + half + Colours::u_to_b * u),
            grey_level(grey + half + Colours::u_to_g * u + Colours::v_to_g * v),
            grey_level(grey + half + Colours::v_to_r * v)};
  }
};

__device__ __forceinline__ void store(unsigned char* canvas, float value) {
  *canvas = static_cast<unsigned char>(static_cast<int>(__fadd_rn(value, 0.5f)));
}

__device__ __forceinline__ void store(float* canvas, float value) { *canvas = value; }

struct Tap {
  int first, second;
  float weight;  // of the second
};

__device__ __forceinline__ Tap tap(double scale, int target, int source_size) {
  float place = static_cast<float>(scale * (target + 0.5) - 0.5);
  place = place < 0.0f ? 0.0f : place;
  const int whole = static_cast<int>(place), last = source_size - 1;
  const int first = whole < last ? whole : last, second = first + 1 < last ? first + 1 : last;
  const float weight = __fsub_rn(place, static_cast<float>(first));
  return {first, second, weight < 1.0f ? weight : 1.0f};
}

__device__ __forceinline__ float mix(float a, float b, float weight) {
  return __fadd_rn(a, __fmul_rn(__fsub_rn(b, a), weight));
}

// Columns of two rows first, then along the row.
__device__ __forceinline__ float mix(float above_left, float above_right, float below_left, float below_right,
                                     float across, float down) {
  return mix(mix(above_left, below_left, down), mix(above_right, below_right, down), across);
}

template <typename Format, typename Value>
__device__ __forceinline__ void to_canvas(const unsigned char* frame, const unsigned char* chroma, long long pitch,
                                          int height, int width, Value* canvas, int canvas_width,
                                          float* image_size, int valid_height, int valid_width, double scale_y,
                                          double scale_x) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y;
  if (x == 0 && y == 0) {
    image_size[0] = static_cast<float>(valid_height);
    image_size[1] = static_cast<float>(valid_width);
  }
  if (x >= canvas_width) return;
  Value* pixel = canvas + (static_cast<long long>(y) * canvas_width + x) * 3;
  if (x >= valid_width || y >= valid_height) {
    pixel[0] = pixel[1] = pixel[2] = 0;
    return;
  }
  const Tap row = tap(scale_y, y, height), column = tap(scale_x, x, width);
  const Pixel a = Format::read(frame, chroma, pitch, column.first, row.first);
  const Pixel b = Format::read(frame, chroma, pitch, column.second, row.first);
  const Pixel c = Format::read(frame, chroma, pitch, column.first, row.second);
  const Pixel d = Format::read(frame, chroma, pitch, column.second, row.second);
  store(pixel, mix(a.b, b.b, c.b, d.b, column.weight, row.weight));
  store(pixel + 1, mix(a.g, b.g, c.g, d.g, column.weight, row.weight));
  store(pixel + 2, mix(a.r, b.r, c.r, d.r, column.weight, row.weight));
}

#define KERNEL(name, Format, Value)                                                                        \
  extern "C" __global__ void name(const unsigned char* frame, const unsigned char* chroma, long long pitch, \
                                  int height, int width, Value* canvas, int canvas_width,                  \
                                  float* image_size, int valid_height, int valid_width, double scale_y,    \
                                  double scale_x) {                                                        \
    to_canvas<Format, Value>(frame, chroma, pitch, height, width, canvas, canvas_width, image_size,        \
                             valid_height, valid_width, scale_y, scale_x);                                 \
  }

KERNEL(bgr_to_uint8, Bgr, unsigned char)
KERNEL(bgr_to_float32, Bgr, float)
KERNEL(nv12_bt601_to_uint8, Nv12<Bt601>, unsigned char)
KERNEL(nv12_bt601_to_float32, Nv12<Bt601>, float)
KERNEL(nv12_bt601_full_to_uint8, Nv12<Bt601Full>, unsigned char)
KERNEL(nv12_bt601_full_to_float32, Nv12<Bt601Full>, float)
KERNEL(nv12_bt709_to_uint8, Nv12<Bt709>, unsigned char)
KERNEL(nv12_bt709_to_float32, Nv12<Bt709>, float)
KERNEL(nv12_bt709_full_to_uint8, Nv12<Bt709Full>, unsigned char)
KERNEL(nv12_bt709_full_to_float32, Nv12<Bt709Full>, float)
#undef KERNEL
