// Calls a parser as nvinfer does, with plain arrays for Python.
#include "nvdsinfer_custom_impl.h"

// Rows of class, left, top, width, height, confidence into `found`, which has room for `room`; how many, or -1.
extern "C" int parse(NvDsInferParseCustomFunc parser, const char* layer, int type, float* buffer, unsigned slots,
                     unsigned columns, unsigned width, unsigned height, const float* thresholds, unsigned classes,
                     float* found, int room) {
  int counts[3] = {0, 0, 0};  // another output before it
  NvDsInferLayerInfo other{INT32, {1, {3}, 3}, 1, "other", counts, 0};
  NvDsInferLayerInfo own{static_cast<NvDsInferDataType>(type), {2, {slots, columns}, slots * columns}, 2, layer, buffer, 0};
  NvDsInferParseDetectionParams params{classes, {thresholds, thresholds + classes}, {}};
  std::vector<NvDsInferObjectDetectionInfo> objects;
  if (!parser({other, own}, {width, height, 3}, params, objects)) return -1;
  for (int n = 0; n < static_cast<int>(objects.size()) && n < room; ++n) {
    const auto& object = objects[n];
    const float row[] = {static_cast<float>(object.classId), object.left,  object.top,
                         object.width, object.height, object.detectionConfidence};
    for (int column = 0; column < 6; ++column) found[6 * n + column] = row[column];
  }
  return static_cast<int>(objects.size());
}
